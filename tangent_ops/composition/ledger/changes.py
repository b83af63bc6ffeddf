"""A change of the ledger: new files, then the database's commit, then the old files are erased.

Before the commit nothing that the database names is touched; after it, only what it names no more.
A crash leaves files that it does not name. `sweep` erases them, alone with the database, so that
the files of a change under way stay. Other people's files are left alone: see `own_files`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from tangent_ops.composition.ledger import shard_file
from tangent_ops.composition.ledger.own_files import (
    check_file,
    check_folder,
    has_own_name,
    is_plain,
    new_name,
)
from tangent_ops.composition.ledger.records import Records, Row, Transaction
from tangent_ops.composition.ledger.running_sum import RunningSum
from tangent_ops.composition.ledger.shard_file import Label
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import LedgerError
from tangent_ops.files import erase


class Folder:
    """Where the files are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deltas = path / "deltas"
        self.sums = path / "sums"

    def check(self) -> None:
        """Raise LedgerError if a link, or anything but a folder, is where the files should be."""
        check_folder(self.deltas)
        check_folder(self.sums)

    def named(self, transaction: Transaction) -> set[Path]:
        """The files that the database names."""
        seal = transaction.sum()
        sums = {self.sums / seal.name} if seal else set()
        return sums | {self.deltas / row.seal.name for row in transaction.shards()}

    def unnamed(self, transaction: Transaction) -> tuple[list[Path], list[Path]]:
        """Files that the database does not name: those of an interrupted change, and others'."""
        self.check()
        key = transaction.key()
        found = {*self.deltas.iterdir(), *self.sums.iterdir()} - self.named(transaction)
        ours = {path for path in found if has_own_name(path, key) and is_plain(path)}
        return sorted(ours), sorted(found - ours)

    def check_erasable(self, path: Path, transaction: Transaction) -> None:
        """Raise LedgerError for what is no regular file, or has a name that is still in use."""
        check_file(path)
        own = _identity(path)
        if own is None or own.st_nlink == 1:
            return
        for other in self.named(transaction) - {path}:
            found = _identity(other)
            if found is not None and os.path.samestat(own, found):
                raise LedgerError(
                    f"{path} and {other} are one file (hard links), so erasing one would erase "
                    "both: remove the first, or put a copy in its place"
                )


def _identity(path: Path) -> os.stat_result | None:
    """None if it is gone: another process may erase it at any moment."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


class Change:
    """One change under way."""

    def __init__(self, transaction: Transaction, folder: Folder) -> None:
        self.transaction = transaction
        self.started = False  # writing files
        self.obsolete: list[Path] = []
        self._folder = folder

    def add_shard(self, delta: Mapping[str, Tensor], meta: DeltaMeta | None, label: Label) -> None:
        """Write a shard's file, and record it."""
        self.started = True
        path = self._folder.deltas / new_name(self.transaction.key())
        seal = shard_file.save(path, delta, meta, label)
        self.transaction.insert(Row(label.shard, seal, _now()))

    def remove_shard(self, row: Row) -> None:
        """Let a shard go, and its file."""
        self._let_go(self._folder.deltas / row.seal.name)
        self.transaction.delete(row.shard, _now())

    def set_sum(self, total: RunningSum) -> None:
        """Write the running sum, in place of the last one."""
        self.started = True
        old = self.transaction.sum()
        if old is not None:
            self._let_go(self._folder.sums / old.name)
        path = self._folder.sums / new_name(self.transaction.key())
        self.transaction.set_sum(total.save(path))

    def _let_go(self, path: Path) -> None:
        self._folder.check_erasable(path, self.transaction)
        self.obsolete.append(path)


@contextmanager
def change(records: Records, folder: Folder) -> Iterator[Change]:
    """Make one change: all of it, or, if there is an error, nothing.

    Raises:
        LedgerError: the change is made, but an old file could not be erased.
    """
    folder.check()
    current = None
    try:
        with records.writing() as transaction:
            current = Change(transaction, folder)
            yield current
    except BaseException:
        if current is not None and current.started:
            with suppress(LedgerError, OSError):  # the next to open the ledger tries again
                sweep(records, folder)
        raise
    try:
        for path in current.obsolete:
            erase(path)
    except OSError as error:
        raise LedgerError(
            f"the change is made, but a file it leaves behind could not be erased: {error}. "
            "Opening the ledger again tries once more"
        ) from error


def sweep(records: Records, folder: Folder) -> None:
    """Erase what interrupted changes left; waits for a change under way, if there is one."""
    with records.reading() as transaction:
        found, _ = folder.unnamed(transaction)
    if not found:
        return
    with records.writing() as transaction:
        found, _ = folder.unnamed(transaction)
        if not _knows_all(transaction, folder):
            return
        for path in found:
            folder.check_erasable(path, transaction)
            erase(path)


def _knows_all(transaction: Transaction, folder: Folder) -> bool:
    """Whether the database names as many shards as the sum counts.

    Or it lost rows, or is an old copy, and what it does not name may be all there is of a shard.
    """
    seal = transaction.sum()
    if seal is None:
        return transaction.blank()
    try:
        return RunningSum.load_count(folder.sums, seal) == transaction.count()
    except LedgerError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
