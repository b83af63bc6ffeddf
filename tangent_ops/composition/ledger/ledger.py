"""`Ledger`: deltas of many shards, their weighted mean, and exact forgetting."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tangent_ops.composition.ledger import delta_shard
from tangent_ops.composition.ledger.base import LedgerBase, check_id, checked_meta
from tangent_ops.composition.ledger.delta_rules import DeltaRules
from tangent_ops.composition.ledger.delta_sum import DeltaSum
from tangent_ops.composition.ledger.kind import Kind, Label, Value
from tangent_ops.composition.ledger.verify import Verified
from tangent_ops.delta import Delta, DeltaMeta, check_values, load_delta, unreadable
from tangent_ops.errors import ArgumentError, LedgerError

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel

DELTAS = Kind(
    "Ledger", "deltas", DeltaSum, delta_shard.save, delta_shard.load, delta_shard.read_label
)


@dataclass(frozen=True)
class Entry:
    """A present shard: its weight, when it was added (UTC, ISO format), and the meta given."""

    shard: str
    weight: float
    added: str
    meta: dict[str, Value]


class Ledger(LedgerBase[Delta, DeltaRules]):
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
        LedgerError: the folder holds other files, a damaged ledger, one of another kind or, without
            create, no ledger.
        DeltaError: the ledger is of another anchor, rank, basis or layout.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        anchor: str | LinearizedModel | None = None,
        create: bool = True,
    ) -> None:
        rules = None if anchor is None else DeltaRules.of_anchor(anchor)
        super().__init__(path, DELTAS, rules, create)

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
        check_id(shard_id)
        label = Label(shard_id, _checked_weight(weight), checked_meta(meta))
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
        self._add(Delta(delta, getattr(delta, "meta", None)), label)

    def composed(self, *, without: str | None = None) -> Delta:
        """The weighted mean of the present shards' deltas, in their dtypes.

        Args:
            without: a present shard that is left out: the same bits as after `forget` of it, but
                the ledger does not change.

        Returns:
            The delta. Its meta is None if a shard has none. Otherwise it has the ledger's anchor,
            rank and basis, the loss if all shards share it, and the alphabetically first of the
            shards' model names and patterns.

        Raises:
            LedgerError: no shard is left, there is no such shard, or a file is damaged.
            DeltaError: a value is beyond its dtype's range.
        """
        total = self._without(without)
        assert isinstance(total, DeltaSum)
        if not total.shards:
            raise LedgerError(f"{self.path} is empty: there is nothing to compose")
        return total.mean()

    def list(self) -> list[Entry]:
        """The present shards, in the order in which they were added.

        Raises:
            LedgerError: a shard's file is missing, damaged or was edited.
        """
        return [
            Entry(row.shard, label.weight, row.added, label.meta) for row, label in self._labels()
        ]

    def origins(self) -> dict[str, DeltaMeta | None]:
        """The meta that each present shard's delta was added with, in the order of `list`.

        Reads the files' headers, not the deltas.

        Raises:
            LedgerError: a shard's file is missing, or its header is damaged or was edited.
        """
        return self._settled(
            lambda transaction: {
                row.shard: self._read(delta_shard.read_origin, row) for row in transaction.shards()
            }
        )

    def verify(self, *, progress: bool = True) -> Verified:
        """Check every file and add up the deltas again, one in memory at a time.

        The ledger is locked against changes meanwhile.

        Args:
            progress: show a bar if it takes more than two seconds.

        Raises:
            LedgerError: there are problems; the message names each of them and the way out.
        """
        return self._verify(progress)


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
