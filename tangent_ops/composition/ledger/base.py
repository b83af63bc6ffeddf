"""`LedgerBase`: what ledgers of all kinds have in common."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from tangent_ops.checks import suggestion
from tangent_ops.composition.ledger.changes import Change, Folder, change, sweep
from tangent_ops.composition.ledger.kind import C, Kind, Label, R, RunningSum, Value
from tangent_ops.composition.ledger.records import Event, Records, Row, Transaction
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.composition.ledger.verify import ANEW, Verified, summed, verify, way_out
from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.files import sync_folder

DATABASE = "ledger.sqlite"
LONGEST_ID = 200

T = TypeVar("T")


class LedgerBase(Generic[C, R]):
    """A folder of shards with their exact sum.

    Args:
        path: the folder.
        kind: what its shards and its sum hold.
        rules: what the shards must have in common, if it is known.
        create: make a ledger of a new or empty folder.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: Kind[C, R], rules: R | None, create: bool
    ) -> None:
        self.path = Path(path).absolute()
        self._kind = kind
        self._folder = Folder(self.path, kind)
        self._records = Records(self.path / DATABASE, kind.ledger)
        self._open(create)
        if rules is not None:
            self._fix(rules)

    def __repr__(self) -> str:
        return f"{self._kind.ledger}({str(self.path)!r})"

    def forget(self, shard_id: str, *, rebuild: bool = False, progress: bool = True) -> None:
        """Take a shard out of the sum, and erase its file, which holds its meta, too.

        Only the shard's id and the times stay, in `history`.

        Args:
            shard_id: a present shard.
            rebuild: do not read the shard's file, which may be damaged or missing, but add up the
                other shards again, which reads all their files.
            progress: show a bar if rebuilding takes more than two seconds.

        Raises:
            LedgerError: there is no such shard, or a file is damaged, and nothing was changed; or
                the shard is forgotten, but a file could not be erased, as the message then says.
            LedgerBusyError: another process or thread kept the ledger locked for 30 seconds.
            OSError: the disk is full, or cannot be written.
        """
        with change(self._records, self._folder) as current:
            row = self._row(current.transaction, shard_id)
            if rebuild:
                current.remove_shard(row)
                total = self._summed_anew(current, progress)
            else:
                total = self._sum(current.transaction)
                total.subtract(*self._read(self._kind.load, row))
                current.remove_shard(row)
            current.set_sum(total)

    def history(self) -> list[Event]:
        """Which shards were added and forgotten, and when; it holds nothing of their contents."""
        with self._records.reading() as transaction:
            return transaction.history()

    def rebuild(self, *, progress: bool = True) -> None:
        """Compute the sum again from the shards' files, for example in place of a damaged one.

        If the old sum cannot be read, the shards' files fix the anchor and layout.

        Args:
            progress: show a bar if it takes more than two seconds.

        Raises:
            LedgerError: a shard's file is missing, damaged or was edited.
        """
        with change(self._records, self._folder) as current:
            current.set_sum(self._summed_anew(current, progress))
        sweep(self._records, self._folder)  # opening erased nothing if the sum was damaged

    def copy_to(self, folder: Path) -> None:
        """Copy the ledger, as it is at one moment, into an empty folder.

        The copy has what the ledger has: not the contents of forgotten shards, but their ids and
        times, in `history`. A later `forget` does not reach the copy.

        Raises:
            ArgumentError: the folder is not an empty one.
            LedgerBusyError: as in `forget`.
            OSError: a file is missing, or the disk is full.
        """
        if not folder.is_dir() or any(folder.iterdir()):
            raise ArgumentError(f"{folder} is not an empty folder: make one for the copy")
        with self._records.writing() as transaction:  # so nothing changes meanwhile
            for path in sorted(self._folder.named(transaction)):
                target = folder / path.relative_to(self.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target, follow_symlinks=False)
            self._records.copy_to(folder / DATABASE)

    def __len__(self) -> int:
        with self._records.reading() as transaction:
            return transaction.count()

    def __contains__(self, shard_id: object) -> bool:
        with self._records.reading() as transaction:
            return transaction.shard(shard_id) is not None

    def _labels(self) -> list[tuple[Row, Label]]:
        """The present shards' rows and labels, in the order in which they were added."""
        return self._settled(
            lambda transaction: [
                (row, self._read(self._kind.read_label, row)) for row in transaction.shards()
            ]
        )

    def _add(self, content: C, label: Label) -> None:
        with change(self._records, self._folder) as current:
            if current.transaction.shard(label.shard) is not None:
                raise LedgerError(
                    f"shard {label.shard!r} is in the ledger already: forget it first, or choose "
                    "another id"
                )
            total = self._sum(current.transaction)
            total.add(content, label)
            current.add_shard(content, label)
            current.set_sum(total)

    def _without(self, shard_id: str | None) -> RunningSum[C, R]:
        """The sum, less one shard; the ledger does not change."""

        def read(transaction: Transaction) -> RunningSum[C, R]:
            total = self._sum(transaction)
            if shard_id is not None:
                row = self._row(transaction, shard_id)
                total.subtract(*self._read(self._kind.load, row))
            return total

        return self._settled(read)

    def _row(self, transaction: Transaction, shard_id: str) -> Row:
        row = transaction.shard(shard_id)
        if row is None:
            known = [one.shard for one in transaction.shards()]
            near = suggestion(str(shard_id), known, "shards")
            raise LedgerError(f"shard {shard_id!r} is not in the ledger{near}")
        return row

    def _verify(self, progress: bool) -> Verified:
        with self._records.writing() as transaction:
            return verify(transaction, self._folder, progress)

    def _open(self, create: bool) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            what = "a file" if self.path.exists() else "a link that leads nowhere"
            raise ArgumentError(f"{self.path} is {what}: a ledger is a folder")
        if create:
            new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if new:
                sync_folder(self.path.parent)
            self._records.create()
        else:
            self._records.check()
        self._folder.check()
        for folder in (self._folder.shards, self._folder.sums):
            if not folder.exists():  # a new ledger, or one copied without its empty folders
                folder.mkdir(exist_ok=True)
                sync_folder(self.path)
        sweep(self._records, self._folder)

    def _fix(self, rules: R) -> None:
        what = f"the anchor given for {self.path}"
        known = self._settled(self._rules)
        if known is None or known.joined(rules, what) != known:
            with change(self._records, self._folder) as current:
                total = self._sum(current.transaction)
                total.rules = total.rules.joined(rules, what)
                current.set_sum(total)

    def _settled(self, read: Callable[[Transaction], T]) -> T:
        """The result of `read` on one state; repeated if a change erased its files meanwhile."""
        while True:
            with self._records.reading() as transaction:
                seal = transaction.sum()
                try:
                    return read(transaction)
                except LedgerError as error:
                    failure = error
            with self._records.reading() as transaction:
                if transaction.sum() == seal:  # same file name, so no change in between
                    raise failure

    def _sum(self, transaction: Transaction) -> RunningSum[C, R]:
        seal = transaction.sum()
        try:
            if seal is None:
                if not transaction.blank():
                    raise LedgerError(f"the database of {self.path} lost its sum")
                return self._kind.sum.empty()
            total = self._kind.sum.load(self._folder.sums, seal)
            here, summed = transaction.count(), total.shards
            if here != summed:
                raise LedgerError(
                    f"the database of {self.path} names {here} shards, its sum is of {summed}: "
                    "restore the folder from a copy, or keep the shards of list()"
                )
            return total
        except LedgerError as error:
            raise LedgerError(f"{error}; {ANEW}") from error

    def _rules(self, transaction: Transaction) -> R | None:
        seal = transaction.sum()
        return None if seal is None else self._kind.sum.load_rules(self._folder.sums, seal)

    def _summed_anew(self, current: Change[C, R], progress: bool) -> RunningSum[C, R]:
        try:
            rules = self._rules(current.transaction)
        except LedgerError:  # the sum may be damaged
            rules = None
        return summed(current.transaction.shards(), self._folder, rules, progress)

    def _read(self, read: Callable[[Path, Seal, str], T], row: Row) -> T:
        try:
            return read(self._folder.shards, row.seal, row.shard)
        except LedgerError as error:
            raise LedgerError(f"{error}; {way_out(row.shard)}") from error


def check_id(shard_id: str) -> None:
    """Raise ArgumentError unless it is a name of up to 200 printable characters."""
    if not isinstance(shard_id, str) or not shard_id.strip() or not shard_id.isprintable():
        raise ArgumentError(f"shard_id must be a string of printable characters, got {shard_id!r}")
    if len(shard_id) > LONGEST_ID:
        raise ArgumentError(f"shard_id has {len(shard_id)} characters, at most {LONGEST_ID} fit")


def checked_meta(meta: Mapping[str, Value] | None) -> dict[str, Value]:
    """A copy of a shard's meta; raises ArgumentError unless JSON can hold it."""
    for key, value in (meta or {}).items():
        plain = value is None or isinstance(value, (str, int, float))
        if not isinstance(key, str) or not plain:
            raise ArgumentError(
                f"meta maps {key!r} to {value!r}: keys are strings, and values strings, numbers, "
                "bools or None"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"meta[{key!r}] must be finite, got {value!r}")
    return dict(meta or {})
