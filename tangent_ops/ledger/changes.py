"""A change of the ledger: new files, then the database's commit, then the old files are erased.

Before the commit nothing that the database names is touched; after it, only what it names no more.
A crash leaves files that it does not name. `sweep` erases them, alone with the database, so that
the files of a change under way stay.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from tangent_ops._files import sync_folder
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import LedgerError
from tangent_ops.ledger import sealed, shard_file
from tangent_ops.ledger.records import Records, Row, Transaction
from tangent_ops.ledger.running_sum import RunningSum
from tangent_ops.ledger.shard_file import Label

_OURS = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{16}\.tmp")  # of write_atomically, too


class Folder:
    """Where the files are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deltas = path / "deltas"
        self.sums = path / "sums"

    def unnamed(self, transaction: Transaction) -> tuple[list[Path], list[Path]]:
        """Files that the database does not name: those of an interrupted change, and others'."""
        seal = transaction.sum()
        named = {self.sums / seal.name} if seal else set()
        named |= {self.deltas / row.seal.name for row in transaction.shards()}
        found = sorted({*self.deltas.iterdir(), *self.sums.iterdir()} - named)
        ours = [path for path in found if _OURS.fullmatch(path.name)]
        return ours, [path for path in found if not _OURS.fullmatch(path.name)]


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
        seal = shard_file.save(self._folder.deltas / sealed.new_name(), delta, meta, label)
        self.transaction.insert(Row(label.shard, seal, _now()))

    def remove_shard(self, row: Row) -> None:
        """Let a shard go, and its file."""
        self.obsolete.append(self._folder.deltas / row.seal.name)
        self.transaction.delete(row.shard, _now())

    def set_sum(self, total: RunningSum) -> None:
        """Write the running sum, in place of the last one."""
        self.started = True
        old = self.transaction.sum()
        if old is not None:
            self.obsolete.append(self._folder.sums / old.name)
        self.transaction.set_sum(total.save(self._folder.sums / sealed.new_name()))


@contextmanager
def change(records: Records, folder: Folder) -> Iterator[Change]:
    """Make one change: all of it, or, if there is an error, nothing.

    Raises:
        LedgerError: the change is made, but an old file could not be erased.
    """
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
        for path in found:
            erase(path)


def erase(path: Path) -> None:
    """Overwrite a file with zeros, then remove it; fine if it is gone already."""
    with suppress(FileNotFoundError):
        with open(path, "r+b") as file:
            left = os.fstat(file.fileno()).st_size
            while left:
                left -= file.write(bytes(min(left, 1 << 20)))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        sync_folder(path.parent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
