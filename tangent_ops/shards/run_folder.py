"""The folder of a run: its files' names, its lock, and a check of a new one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tangent_ops.errors import PlanError

DATABASE = "plan.sqlite"
ANCHOR = "anchor.safetensors"
BASIS = "basis.safetensors"
DELTAS = "deltas"
STATISTICS = "statistics"
LEDGER = "ledger"
COMPOSITIONS = "compositions"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run's lock.

    Raises:
        PlanError: another process holds it; or a link leads out of the run's folder, so files would
            be written and erased elsewhere.
    """
    lock = path / ".lock"
    for own in (*(path / name for name in (DELTAS, STATISTICS, LEDGER, COMPOSITIONS)), lock):
        if own.is_symlink():
            raise PlanError(
                f"{own} is a symbolic link, and a run writes and erases only in its own folder: "
                "replace the link by the folder, or move the whole run and link to that"
            )
    if lock.exists() and not lock.is_file():  # opening a pipe would block
        raise PlanError(f"{lock} is no file: remove it")
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlanError(f"another process is at work in {path}: wait for it") from error
        yield


def check_folder(path: Path) -> None:
    """Raise PlanError unless a plan is in this folder, or can be written there.

    It is a file, or a folder with other files and no plan, or there is no permission.
    """
    if (path / DATABASE).exists():
        return
    above = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not above.is_dir() and above != path:
        raise PlanError(f"{path} cannot be made, because {above} is a file: give another folder")
    if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        raise PlanError(f"{path} cannot be written: no permission in {above}. Give another folder")
    if above != path:
        return
    if not path.is_dir() or any(map(_foreign, path.iterdir())):
        raise PlanError(f"{path} holds no plan, but other files: give a new or empty folder")


def _foreign(path: Path) -> bool:
    """Whether the file is not from an interrupted `Plan.create`, which writes the database last."""
    results = path.name in (DELTAS, STATISTICS)
    empty = results and path.is_dir() and not any(path.iterdir())
    return not (empty or path.name in (ANCHOR, BASIS) or path.suffix == ".tmp")
