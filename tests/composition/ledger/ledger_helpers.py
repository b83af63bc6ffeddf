"""Tools that look into a ledger's folder, and damage or kill a ledger."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from ledger_contents import FOLDERS, AnyLedger

from tangent_ops.errors import LedgerError


def tree(path: Path) -> dict[str, str]:
    """Relative path of each file in a folder -> SHA-256 of its content."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def shard_folder(ledger: AnyLedger) -> Path:
    return ledger.path / FOLDERS[type(ledger)]


def assert_tidy(ledger: AnyLedger) -> None:
    """The folder holds one file per shard, at most one sum, and no log of SQLite."""
    names = sorted([FOLDERS[type(ledger)], "ledger.sqlite", "sums"])
    assert sorted(os.listdir(ledger.path)) == names
    assert len(os.listdir(shard_folder(ledger))) == len(ledger)
    assert len(os.listdir(ledger.path / "sums")) <= 1


def fork(work: Callable[[], object]) -> int:
    """Starts a child that calls `work` and exits with 0, or 1 after an error; returns its id."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn about threads; the child gives ours no work.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Waits for a child; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shard_file(ledger: AnyLedger, shard: str) -> Path:
    with ledger._records.reading() as transaction:
        row = transaction.shard(shard)
    assert row is not None
    return shard_folder(ledger) / row.seal.name


def sum_file(ledger: AnyLedger) -> Path:
    with ledger._records.reading() as transaction:
        row = transaction.sum()
    assert row is not None
    return ledger.path / "sums" / row.name


def edit_database(ledger: AnyLedger, *statements: str) -> None:
    with closing(sqlite3.connect(ledger.path / "ledger.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def refused(
    where: AnyLedger | Path,
    message: str,
    *works: Callable[[], object],
    error: type[BaseException] = LedgerError,
) -> None:
    """Each call of `works` raises the error and changes no file."""
    path = where.path if isinstance(where, AnyLedger) else where
    before = tree(path)
    for work in works:
        with pytest.raises(error, match=message):
            work()
        assert tree(path) == before


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CONNECT = sqlite3.connect


def watch_statements(monkeypatch, watch):
    """Calls `watch(execute, statement)` before each statement that SQLite executes."""

    class Connection(sqlite3.Connection):
        def execute(self, statement, *args):
            watch(super().execute, statement)
            return super().execute(statement, *args)

    monkeypatch.setattr(sqlite3, "connect", partial(CONNECT, factory=Connection))
