"""Checks of the files that a command will write, before it computes anything."""

from __future__ import annotations

import os
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
