"""Recognizes the ledger's own files: regular files with names that only the ledger can make.

A name is 16 random hexadecimal digits, then 16 of their hash with a key in the ledger's database.
So a file that a killed process left, perhaps half-written, is recognized by its name, and a file
that merely looks like the ledger's own is not erased.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from pathlib import Path

from tangent_ops.errors import LedgerError

_NAME = re.compile(r"([0-9a-f]{16})([0-9a-f]{16})\.safetensors")
_KINDS = {
    stat.S_IFLNK: "a symbolic link, which is never followed here",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def new_key() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


def new_name(key: str) -> str:
    """A random name, which reveals nothing and was not used before."""
    nonce = secrets.token_hex(8)
    return f"{nonce}{_mark(key, nonce)}.safetensors"


def has_own_name(path: Path, key: str) -> bool:
    """Whether `new_name` of this key gave the file its name."""
    found = _NAME.fullmatch(path.name)
    return found is not None and _mark(key, found[1]) == found[2]


def may_be_named(name: object) -> bool:
    """Whether it is a name as in `new_name`; another, in an edited database, could be a path."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_plain(path: Path) -> bool:
    """Whether it is a regular file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def check_file(path: Path) -> None:
    """Raise LedgerError if the path exists and is not a regular file."""
    _check(path, stat.S_IFREG)


def check_folder(path: Path) -> None:
    """Raise LedgerError if the path exists and is not a folder."""
    _check(path, stat.S_IFDIR)


def _check(path: Path, expected: int) -> None:
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if kind != expected:
        raise LedgerError(
            f"{path} is {_KINDS.get(kind, 'a device')}, where a ledger has {_KINDS[expected]}: "
            "move it elsewhere"
        )


def _mark(key: str, nonce: str) -> str:
    return hashlib.sha256(f"{key} {nonce}".encode()).hexdigest()[:16]
