"""Atomic changes of a ledger: write new files, commit the database, erase the old files.

Files that the database names are not touched before the commit. A crash leaves files that the
database does not name; `sweep` erases them under the database's write lock, so it cannot meet a
change in progress. Files that the ledger did not write are never erased: see `own_files`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic

from tangent_ops.composition.ledger.kind import C, Kind, Label, R, RunningSum
from tangent_ops.composition.ledger.own_files import (
    check_file,
    check_folder,
    has_own_name,
    is_plain,
    new_name,
)
from tangent_ops.composition.ledger.records import Records, Row, Transaction
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.errors import LedgerError, in_words
from tangent_ops.files import erase


class Folder(Generic[C, R]):
    """The ledger's folders of shards and sums."""

    def __init__(self, path: Path, kind: Kind[C, R]) -> None:
        self.path = path
        self.kind = kind
        self.shards = path / kind.folder
        self.sums = path / "sums"

    def check(self) -> None:
        """Raise LedgerError if a link, or anything but a folder, is in place of a folder."""
        check_folder(self.shards)
        check_folder(self.sums)

    def named(self, transaction: Transaction) -> set[Path]:
        """The files that the database names."""
        seal = transaction.sum()
        sums = {self.sums / seal.name} if seal else set()
        return sums | {self.shards / row.seal.name for row in transaction.shards()}

    def unnamed(self, transaction: Transaction) -> tuple[list[Path], list[Path]]:
        """Files that the database does not name: the ledger's own, and foreign ones."""
        self.check()
        key = transaction.key()
        found = {*self.shards.iterdir(), *self.sums.iterdir()} - self.named(transaction)
        ours = {path for path in found if has_own_name(path, key) and is_plain(path)}
        return sorted(ours), sorted(found - ours)

    def check_erasable(self, path: Path, transaction: Transaction) -> None:
        """Raise LedgerError for a special file, or a hard link to a file that is still in use."""
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
    """Device and inode, or None if the file is gone: another process may erase it at any time."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


class Change(Generic[C, R]):
    """A change in progress."""

    def __init__(self, transaction: Transaction, folder: Folder[C, R]) -> None:
        self.transaction = transaction
        self.started = False  # True once a file is written
        self.obsolete: list[Path] = []
        self._folder = folder

    def add_shard(self, content: C, label: Label) -> None:
        """Write a shard's file and record it."""
        seal = self._save(content, label)
        self.transaction.insert(Row(label.shard, seal, _now()))

    def replace_shard(self, row: Row, content: C, label: Label) -> None:
        """Write a shard's new file; the previous one is erased after the commit."""
        self._erase_later(self._folder.shards / row.seal.name)
        self.transaction.replace(row.shard, self._save(content, label), _now())

    def remove_shard(self, row: Row) -> None:
        """Record that a shard was forgotten; its file is erased after the commit."""
        self._erase_later(self._folder.shards / row.seal.name)
        self.transaction.delete(row.shard, _now())

    def set_sum(self, total: RunningSum[C, R]) -> None:
        """Write the running sum; the previous one's file is erased after the commit."""
        self.started = True
        old = self.transaction.sum()
        if old is not None:
            self._erase_later(self._folder.sums / old.name)
        path = self._folder.sums / new_name(self.transaction.key())
        self.transaction.set_sum(total.save(path))

    def _save(self, content: C, label: Label) -> Seal:
        self.started = True
        path = self._folder.shards / new_name(self.transaction.key())
        return self._folder.kind.save(path, content, label)

    def _erase_later(self, path: Path) -> None:
        self._folder.check_erasable(path, self.transaction)
        self.obsolete.append(path)


@contextmanager
def change(records: Records, folder: Folder[C, R]) -> Iterator[Change[C, R]]:
    """Make one change completely, or, if there is an error, not at all.

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
            with suppress(LedgerError, OSError):  # opening the ledger sweeps again
                sweep(records, folder)
        raise
    try:
        for path in current.obsolete:
            erase(path)
    except OSError as error:
        raise LedgerError(
            f"the change is made, but an old file could not be erased: {in_words(error)}. "
            "Open the ledger again to erase it"
        ) from error


def sweep(records: Records, folder: Folder[C, R]) -> None:
    """Erase the files that interrupted changes left, after any change in progress has ended."""
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


def _knows_all(transaction: Transaction, folder: Folder[C, R]) -> bool:
    """Whether the database names as many shards as the sum counts.

    If not, the database lost rows or is an old copy, and an unnamed file may be a shard's only one.
    """
    seal = transaction.sum()
    if seal is None:
        return transaction.blank()
    try:
        return folder.kind.sum.load_count(folder.sums, seal) == transaction.count()
    except LedgerError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
