"""A commit's own tests, run in its checkout before anything is said about its speed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare_worker import search_path
from benchmarks.processes import started

# pytest's exit statuses: a usage error, as of a test's name that is not there, and no test at all.
NOTHING_RUN = (4, 5)
LINES = 15


class RedTests(Exception):
    """Tests fail; the message says which, and how to see them."""


class NoTests(Exception):
    """There is nothing to run; the message names the argument."""


def check_tests(worktree: Path, paths: Sequence[str]) -> None:
    """Raises NoTests unless every path (without its ::names) is a relative one of the checkout."""
    for path in paths:
        file = path.partition("::")[0]
        if Path(file).is_absolute() or not (worktree / file).exists():
            raise NoTests(
                f"--tests {path}: the head has no such path; they are relative to the "
                "repository's root, and must be committed"
            )


def run_tests(worktree: Path, commit: str, paths: Sequence[str]) -> None:
    """Runs the tests of a checkout, with its own sources.

    Raises:
        RedTests: one fails.
        NoTests: the paths hold none.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *paths]
    environment = dict(os.environ) | {"PYTHONPATH": search_path(worktree)}
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started(command, cwd=worktree, env=environment, **merged) as process:
        printed, _ = process.communicate()
    if process.returncode == 0:
        return
    lines = printed.splitlines()
    last = "\n".join(f"    {line}" for line in lines[-LINES:])
    if process.returncode in NOTHING_RUN:
        raise NoTests(f"--tests {' '.join(paths)}: nothing was run; pytest says:\n{last}")
    red = "\n".join(f"    {line}" for line in lines if line.startswith(("FAILED ", "ERROR ")))
    again = shlex.join(["python", *command[1:4], *paths])
    raise RedTests(
        f"tests are red at head {commit[:12]}, so nothing was timed:\n{red or last}\n"
        f"To see them: git worktree add --detach ../head {commit[:12]} && cd ../head && "
        f"PYTHONPATH=.:kernels {again}"
    )
