"""`Ledger`: deltas of many shards, their weighted mean, and exact forgetting."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from tangent_ops.composition.ledger import shard_file
from tangent_ops.composition.ledger.changes import Change, Folder, change, sweep
from tangent_ops.composition.ledger.records import Event, Records, Row, Transaction
from tangent_ops.composition.ledger.rules import Rules
from tangent_ops.composition.ledger.running_sum import RunningSum
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.composition.ledger.shard_file import Label, Value
from tangent_ops.composition.ledger.verify import ANEW, Verified, summed, verify, way_out
from tangent_ops.delta import Delta, DeltaMeta, check_values, load_delta, unreadable
from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.files import sync_folder

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel

DATABASE = "ledger.sqlite"
LONGEST_ID = 200

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A present shard: its weight, when it was added (UTC, ISO format), and the meta given."""

    shard: str
    weight: float
    added: str
    meta: dict[str, Value]


class Ledger:
    """A folder that holds the deltas of shards, and gives their weighted mean at any time.

    `composed` depends on the present shards only, bit for bit: after `forget` it is the same as if
    the shard had never been added, whatever the order of additions and removals. Adding and
    forgetting read and write one delta and one sum, however many shards there are. A change is
    made completely or not at all, even with crashes, power cuts, and any number of processes and
    threads. No file stays open between calls.

    The terms w δ are added as multiples of 2^-40 (see `fixed_point`): the mean of n shards of total
    weight W is within n / W · 4.6e-13 + A · 4.5e-16 of the exact one, before it is rounded to the
    deltas' dtype, where A is the weighted mean of |δ|. The sum over the shards of weight times
    largest magnitude may be at most 2^23.

    Forgetting overwrites the shard's file and the previous sum with zeros and removes them. It does
    not reach copies and backups, compositions exported before, older versions on filesystems that
    copy on write, and blocks that an SSD keeps.

    Args:
        path: the folder; a new or an empty one becomes a ledger. It must be on a local disk,
            because SQLite's log needs shared memory. It may be a link to a folder. Links inside it
            are never followed, and files that are not the ledger's are never erased.
        anchor: accept only deltas of this anchor: its fingerprint, or a tangent model, which also
            fixes rank, basis, names, shapes and dtypes. By default the first delta fixes them all.
        create: False raises LedgerError for a folder without a ledger.

    Raises:
        ArgumentError: anchor is neither; or the path is a file, or a link that leads nowhere.
        LedgerError: the folder holds other files, a damaged ledger or, without create, no ledger.
        DeltaError: the ledger is of another anchor, rank, basis or layout.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        anchor: str | LinearizedModel | None = None,
        create: bool = True,
    ) -> None:
        rules = None if anchor is None else Rules.of_anchor(anchor)
        self.path = Path(path).absolute()
        self._folder = Folder(self.path)
        self._records = Records(self.path / DATABASE)
        self._open(create)
        if rules is not None:
            self._fix(rules)

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r})"

    def add(
        self,
        shard_id: str,
        delta: Mapping[str, Tensor] | str | os.PathLike[str],
        weight: float = 1,
        meta: Mapping[str, Value] | None = None,
    ) -> None:
        """Add a shard's delta.

        Args:
            shard_id: a name of up to 200 printable characters; that of a forgotten shard may be
                used again.
            delta: a delta, or the path of its file. Of a dict without `DeltaMeta` only the names,
                shapes and dtypes are checked, as its anchor is unknown.
            weight: of this shard in the mean; positive.
            meta: facts about the shard, which `list` returns: strings, numbers, bools and None.
                They are erased when the shard is forgotten.

        Raises:
            ArgumentError: shard_id, weight or meta is not as above.
            DeltaError: another anchor, rank, basis, names, shapes or dtypes than the ledger's, or
                values that are not finite.
            DeltaFileError: the file is truncated, was edited, or is not a delta file.
            LedgerError: the shard is present already; a tensor is sparse or on the meta device; the
                values are out of the range of fixed point, or all round to zero in it; the sum or
                the database is damaged.
            LedgerBusyError: another process or thread kept the ledger locked for 30 seconds.
            OSError: the disk is full, or cannot be written.
        """
        _check_id(shard_id)
        label = Label(shard_id, _checked_weight(weight), _checked_meta(meta))
        what = f"shard {shard_id!r}"
        if isinstance(delta, Mapping):
            for name, value in delta.items():
                if isinstance(value, Tensor) and (problem := unreadable(value)):
                    raise LedgerError(f"{what}: {name} {problem}")
            check_values(delta, what)
        elif isinstance(delta, (str, os.PathLike)):
            delta = load_delta(delta)
        else:
            kind = type(delta).__name__
            raise ArgumentError(f"delta must be a dict of tensors or a path, got a {kind}")
        origin = getattr(delta, "meta", None)

        with change(self._records, self._folder) as current:
            if current.transaction.shard(shard_id) is not None:
                raise LedgerError(
                    f"{what} is in the ledger already: forget it first, or choose another id"
                )
            total = self._sum(current.transaction)
            total.add(delta, origin, label.weight, what)
            current.add_shard(delta, origin, label)
            current.set_sum(total)

    def forget(self, shard_id: str, *, rebuild: bool = False, progress: bool = True) -> None:
        """Take a shard's delta out of the mean, and erase the delta with its weight and meta.

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
            row = current.transaction.shard(shard_id)
            if row is None:
                raise LedgerError(f"shard {shard_id!r} is not in the ledger: see list()")
            if rebuild:
                current.remove_shard(row)
                total = self._summed_anew(current, progress)
            else:
                total = self._sum(current.transaction)
                delta, label = self._read(shard_file.load, row)
                total.subtract(delta, delta.meta, label.weight, f"shard {shard_id!r}")
                current.remove_shard(row)
            current.set_sum(total)

    def composed(self) -> Delta:
        """The weighted mean of the present shards' deltas, in their dtypes.

        Returns:
            The delta. Its meta is None if a shard has none. Otherwise it has the ledger's anchor,
            rank and basis, the loss if all shards share it, and the alphabetically first of the
            shards' model names and patterns.

        Raises:
            LedgerError: the ledger is empty, or its sum is damaged.
            DeltaError: a value is beyond its dtype's range.
        """
        total = self._settled(self._sum)
        if not total.origins:
            raise LedgerError(f"{self.path} is empty: there is nothing to compose")
        return total.mean()

    def list(self) -> list[Entry]:
        """The present shards, in the order in which they were added.

        Raises:
            LedgerError: a shard's file is missing, damaged or was edited.
        """
        return self._settled(self._entries)

    def origins(self) -> dict[str, DeltaMeta | None]:
        """The meta that each present shard's delta was added with, in the order of `list`.

        Reads the files' headers, not the deltas.

        Raises:
            LedgerError: a shard's file is missing, or its header is damaged or was edited.
        """
        return self._settled(
            lambda transaction: {
                row.shard: self._read(shard_file.read_origin, row) for row in transaction.shards()
            }
        )

    def history(self) -> list[Event]:
        """Which shards were added and forgotten, and when; it holds nothing of their contents."""
        with self._records.reading() as transaction:
            return transaction.history()

    def verify(self, *, progress: bool = True) -> Verified:
        """Check every file and add up the deltas again, one in memory at a time.

        The ledger is locked against changes meanwhile.

        Args:
            progress: show a bar if it takes more than two seconds.

        Raises:
            LedgerError: there are problems; the message names each of them and the way out.
        """
        with self._records.writing() as transaction:
            return verify(transaction, self._folder, progress)

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

    def __len__(self) -> int:
        with self._records.reading() as transaction:
            return transaction.count()

    def __contains__(self, shard_id: object) -> bool:
        with self._records.reading() as transaction:
            return transaction.shard(shard_id) is not None

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
        for folder in (self._folder.deltas, self._folder.sums):
            if not folder.exists():  # a new ledger, or one copied without its empty folders
                folder.mkdir(exist_ok=True)
                sync_folder(self.path)
        sweep(self._records, self._folder)

    def _fix(self, rules: Rules) -> None:
        def fixed(known: Rules) -> Rules:
            return known.joined(rules, f"the anchor given for {self.path}")

        known = self._settled(self._rules)
        if fixed(known) != known:
            with change(self._records, self._folder) as current:
                total = self._sum(current.transaction)
                total.rules = fixed(total.rules)
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

    def _sum(self, transaction: Transaction) -> RunningSum:
        seal = transaction.sum()
        try:
            if seal is None:
                if not transaction.blank():
                    raise LedgerError(f"the database of {self.path} lost its sum")
                return RunningSum()
            total = RunningSum.load(self._folder.sums, seal)
            here, summed = transaction.count(), total.origins.total()
            if here != summed:
                raise LedgerError(
                    f"the database of {self.path} names {here} shards, its sum is of {summed}: "
                    "restore the folder from a copy, or keep the shards of list()"
                )
            return total
        except LedgerError as error:
            raise LedgerError(f"{error}; {ANEW}") from error

    def _rules(self, transaction: Transaction) -> Rules:
        seal = transaction.sum()
        return Rules() if seal is None else RunningSum.load_rules(self._folder.sums, seal)

    def _summed_anew(self, current: Change, progress: bool) -> RunningSum:
        try:
            rules = self._rules(current.transaction)
        except LedgerError:  # the sum may be damaged
            rules = Rules()
        return summed(current.transaction.shards(), self._folder, rules, progress)

    def _entries(self, transaction: Transaction) -> list[Entry]:
        entries = []
        for row in transaction.shards():
            label = self._read(shard_file.read_label, row)
            entries.append(Entry(row.shard, label.weight, row.added, label.meta))
        return entries

    def _read(self, read: Callable[[Path, Seal, str], T], row: Row) -> T:
        try:
            return read(self._folder.deltas, row.seal, row.shard)
        except LedgerError as error:
            raise LedgerError(f"{error}; {way_out(row.shard)}") from error


def _check_id(shard_id: str) -> None:
    if not isinstance(shard_id, str) or not shard_id.strip() or not shard_id.isprintable():
        raise ArgumentError(f"shard_id must be a string of printable characters, got {shard_id!r}")
    if len(shard_id) > LONGEST_ID:
        raise ArgumentError(f"shard_id has {len(shard_id)} characters, at most {LONGEST_ID} fit")


def _checked_weight(weight: float) -> float:
    if not isinstance(weight, numbers.Real):
        raise ArgumentError(f"weight must be a number, got {weight!r}")
    try:
        checked = float(weight)
    except OverflowError as error:
        raise ArgumentError(f"weight is too large: {weight!r}") from error
    if not (math.isfinite(checked) and checked > 0):
        raise ArgumentError(f"weight must be finite and positive, got {weight!r}")
    return checked


def _checked_meta(meta: Mapping[str, Value] | None) -> dict[str, Value]:
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
