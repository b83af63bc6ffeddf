"""Adds up the shards' files again, one in memory at a time, to check or replace the sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

from tangent_ops.composition.ledger.changes import Folder
from tangent_ops.composition.ledger.kind import C, R, RunningSum
from tangent_ops.composition.ledger.records import Row, Transaction
from tangent_ops.errors import LedgerError, TangentOpsError

ANEW = "rebuild(), or ledger verify --rebuild in a shell, adds up the shards again"


@dataclass(frozen=True)
class Verified:
    """A ledger without problems.

    Attributes:
        shards: how many are present.
        weight: their total weight; of statistics, the number of samples.
        bytes: the size of their files.
    """

    shards: int
    weight: float
    bytes: int


def verify(transaction: Transaction, folder: Folder[C, R], progress: bool) -> Verified:
    """Check every file, the sum and the database, whose write lock `transaction` holds.

    Raises:
        LedgerError: there are problems; the message names each of them and the way out.
    """
    problems = [f"the database: {problem}" for problem in transaction.problems()]
    if problems:
        problems.append("restore the database from a copy")
    rows = transaction.shards()
    anew, broken = folder.kind.sum.empty(), []
    for row in _bar(rows, progress):
        try:
            _add(anew, folder, row)
        except TangentOpsError as error:
            broken.append(f"{error}; {way_out(row.shard)}")
    problems += broken

    seal = transaction.sum()
    if seal is not None or not transaction.blank():
        try:
            if seal is None:
                raise LedgerError("the database names no sum")
            stored = folder.kind.sum.load(folder.sums, seal)
            differences = [] if broken else stored.differences(anew)
            if differences:
                raise LedgerError(f"the sum does not match the shards: {', '.join(differences)}")
        except LedgerError as error:
            problems.append(f"{error}; {ANEW}")

    present = set()
    for event in transaction.history():
        if event.what == "added":
            present.add(event.shard)
        elif event.what == "forgotten":
            present.discard(event.shard)
    if present != {row.shard for row in rows}:
        problems.append("the history does not match the shards; restore the database from a copy")

    ours, others = folder.unnamed(transaction)
    problems += [
        f"{path} was left by an interrupted change; open the ledger again" for path in ours
    ]
    problems += [f"{path} is not the ledger's; move it elsewhere" for path in others]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise LedgerError("\n".join([f"{folder.path} has {count}:", *problems]))
    size = sum((folder.shards / row.seal.name).stat().st_size for row in rows)
    return Verified(len(rows), anew.total_weight, size)


def summed(
    rows: Iterable[Row], folder: Folder[C, R], rules: R | None, progress: bool
) -> RunningSum[C, R]:
    """The sum of the shards in `rows`, from their files.

    Raises:
        LedgerError: a shard's file is missing, damaged or was edited.
    """
    total = folder.kind.sum.empty(rules)
    for row in _bar(list(rows), progress):
        try:
            _add(total, folder, row)
        except LedgerError as error:
            raise LedgerError(f"{error}; {way_out(row.shard)}") from error
    return total


def way_out(shard: str) -> str:
    """What to do about a shard whose file is broken."""
    return (
        f"restore the file from a copy, or forget({shard!r}, rebuild=True), which is ledger forget "
        "--rebuild in a shell"
    )


def _add(total: RunningSum[C, R], folder: Folder[C, R], row: Row) -> None:
    total.add(*folder.kind.load(folder.shards, row.seal, row.shard))


def _bar(rows: list[Row], progress: bool) -> Iterable[Row]:
    return tqdm(rows, "ledger", unit="shard", delay=2, leave=False, disable=not progress)
