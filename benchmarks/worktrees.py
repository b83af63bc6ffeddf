"""Commits of a repository, checked out beside it for a while."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import stops_held


class GitError(Exception):
    """Git refused; the message names what was asked, git's reason, and the way out."""


def check_repository(folder: Path) -> None:
    """Raises GitError unless `folder` is the top of a git checkout."""
    found = _git(folder, "rev-parse", "--show-toplevel")
    if found.returncode != 0 or Path(found.stdout.strip()).resolve() != folder.resolve():
        reason = _last_line(found.stderr) or f"it lies inside of {found.stdout.strip()}"
        raise GitError(f"{folder} is not a git checkout ({reason}): run this in a clone")


def commit_of(repository: Path, argument: str, ref: str) -> str:
    """The full hash of the commit that `ref` names.

    Args:
        repository: the checkout.
        argument: who gave the ref ("--base"), for the error.
        ref: branch, tag, hash, HEAD~3 ...

    Raises:
        GitError: there is no such commit.
    """
    found = _git(repository, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode != 0:
        raise GitError(
            f"{argument} {ref}: no such commit (git rev-parse: {_last_line(found.stderr)}); "
            "`git log --oneline` lists commits, `git fetch --unshallow` completes a shallow clone"
        )
    return found.stdout.strip()


def changed_files(repository: Path, but: str) -> list[str]:
    """Files that differ from HEAD or are not in it, but for those under the folder `but`."""
    found = _git(repository, "status", "--porcelain", "--", ".", f":(exclude){but}")
    return [line[3:] for line in found.stdout.splitlines()]


@contextlib.contextmanager
def worktrees(repository: Path, commits: Sequence[str]) -> Iterator[list[Path]]:
    """The commits' checkouts, in order; whatever happens inside, they are gone afterwards.

    Raises:
        GitError: git could not check one out.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_git, repository, "worktree", "prune")  # once the folder is gone
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tangent-ops-"))
        places = []
        for index, commit in enumerate(commits):
            places.append(Path(folder) / f"{index}-{commit[:12]}")
            made = _git(repository, "worktree", "add", "--detach", str(places[-1]), commit)
            if made.returncode != 0:
                raise GitError(f"git worktree add {commit[:12]}: {_last_line(made.stderr)}")
        yield places


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(folder), *arguments]
    try:
        # Interrupted, `worktree add` leaves a lock that `worktree prune` respects for ever.
        with stops_held():
            return subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    except FileNotFoundError:
        raise GitError("git is not on the PATH: install it") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
