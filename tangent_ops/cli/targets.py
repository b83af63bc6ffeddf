"""The files that a command will write: checked before it computes, and told of after Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tangent_ops.errors import ArgumentError


def check_new(path: Path, force: bool, option: str) -> None:
    """Raise ArgumentError if a file cannot be written, or exists and is not to be overwritten."""
    folder = path.parent
    if path.is_dir():
        reason = "it is a folder: give the name of a file"
    elif path.exists() and not path.is_file():
        reason = "it is no regular file: give another name"
    elif path.exists() and not force:
        reason = "it exists: give another name, or --force to overwrite it"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}: make it, or give another name"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"no permission to write in {folder}: give another name"
    else:
        return
    raise ArgumentError(f"{option} {path}: {reason}")


def unwritten(*paths: Path) -> Callable[[], str]:
    """A function that says which files were not written since; each is written whole or not."""
    before = {path: _when(path) for path in paths}

    def told() -> str:
        missing = [str(path) for path, when in before.items() if _when(path) == when]
        if missing:
            return f"{' and '.join(missing)} was not written"
        return f"{' and '.join(map(str, paths))} is written"

    return told


def _when(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
