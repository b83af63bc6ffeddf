"""`StatisticsLedger`: statistics of many shards, their sum, and exact forgetting of samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tangent_ops.composition.ledger import statistics_shard
from tangent_ops.composition.ledger.base import LedgerBase, check_id, checked_meta
from tangent_ops.composition.ledger.changes import change
from tangent_ops.composition.ledger.kind import Kind, Label, Value
from tangent_ops.composition.ledger.statistics_rules import StatisticsRules
from tangent_ops.composition.ledger.statistics_sum import StatisticsSum
from tangent_ops.composition.ridge import TRIED, PathRow, SolvedDelta
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import check_statistics, load_statistics
from tangent_ops.errors import ArgumentError, LedgerError, StatisticsError

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel

STATISTICS = Kind(
    "StatisticsLedger",
    "statistics",
    StatisticsSum,
    statistics_shard.save,
    statistics_shard.load,
    statistics_shard.read_label,
)


@dataclass(frozen=True)
class StatisticsEntry:
    """A present shard.

    Attributes:
        shard: its id.
        samples: how many it has.
        added: when it was added, in UTC, in ISO format.
        meta: as given with it.
    """

    shard: str
    samples: int
    added: str
    meta: dict[str, Value]


@dataclass(frozen=True)
class VerifiedStatistics:
    """A ledger without problems: how many shards and samples, and the size of the shards' files."""

    shards: int
    samples: int
    bytes: int


class StatisticsLedger(LedgerBase[TangentStatistics, StatisticsRules]):
    """A folder that holds the statistics of shards, and gives their sum and its optimum.

    `statistics` and `solve` depend on the present samples only, bit for bit: after `forget` and
    `forget_samples` they are the same as if the samples had never been added, whatever the order of
    additions and removals. Each change reads and writes one shard's statistics and one sum, however
    many shards there are. A change is made completely or not at all, even with crashes, power cuts,
    and any number of processes and threads. No file stays open between calls.

    Statistics reveal data: the ledger is no privacy mechanism. Forgetting overwrites the previous
    files with zeros and removes them. It does not reach copies and backups, deltas that were solved
    before, older versions on filesystems that copy on write, and blocks that an SSD keeps.

    Args:
        path: the folder; a new or an empty one becomes a ledger. It must be on a local disk,
            because SQLite's log needs shared memory. It may be a link to a folder. Links inside it
            are never followed, and files that are not the ledger's are never erased.
        anchor: accept only statistics of this anchor: its fingerprint, or a tangent model, which
            also fixes basis, names, shapes and dtypes. The first statistics fix them all, and loss,
            classes and options.
        create: False raises LedgerError for a folder without a ledger.

    Raises:
        ArgumentError: anchor is neither; or the path is a file, or a link that leads nowhere.
        LedgerError: the folder holds other files, a damaged ledger, one of another kind or, without
            create, no ledger.
        StatisticsError: the ledger is of another anchor, basis or layout.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        anchor: str | LinearizedModel | None = None,
        create: bool = True,
    ) -> None:
        rules = None if anchor is None else StatisticsRules.of_anchor(anchor)
        super().__init__(path, STATISTICS, rules, create)

    def add(
        self,
        shard_id: str,
        statistics: TangentStatistics | str | os.PathLike[str],
        meta: Mapping[str, Value] | None = None,
    ) -> None:
        """Add a shard's statistics.

        Args:
            shard_id: a name of up to 200 printable characters; that of a forgotten shard may be
                used again.
            statistics: from `tangent_ops.statistics`, or the path of their file. Without the list
                of its samples the shard can only be forgotten as a whole.
            meta: facts about the shard, which `list` returns: strings, numbers, bools and None.
                They are erased when the shard is forgotten.

        Raises:
            ArgumentError: an argument is not as above.
            StatisticsError: another anchor, basis, loss, list of classes or layout than the
                ledger's; the sum would be out of range; the statistics contradict themselves.
            StatisticsFileError: the file is truncated, was edited, or holds no statistics.
            LedgerError: the shard is present already; the sum or the database is damaged.
            LedgerBusyError: another process or thread kept the ledger locked for 30 seconds.
            OSError: the disk is full, or cannot be written.
        """
        check_id(shard_id)
        about = checked_meta(meta)
        statistics = _opened(statistics)
        self._add(statistics, Label(shard_id, len(statistics), about))

    def forget_samples(
        self, shard_id: str, statistics: TangentStatistics | str | os.PathLike[str]
    ) -> None:
        """Take some samples out of a shard, and erase its previous statistics.

        If none is left, the shard is forgotten as a whole. Only the shard's id and the times stay,
        in `history`.

        Args:
            shard_id: a present shard.
            statistics: of the samples to forget, or the path of their file. They must be the same
                bits as when the shard's were computed: same images, model, device, number of
                threads and release of torch.

        Raises:
            ArgumentError: statistics is neither, or is of no samples.
            StatisticsError: some of the samples are not in the shard, or it is unknown whether they
                are, because the shard or `statistics` is without the list of its samples; another
                anchor, basis, loss, list of classes or layout than the ledger's.
            StatisticsFileError: the file is truncated, was edited, or holds no statistics.
            LedgerError: there is no such shard, or a file is damaged, and nothing was changed; or
                the samples are forgotten, but a file could not be erased, as the message then says.
            LedgerBusyError: another process or thread kept the ledger locked for 30 seconds.
            OSError: the disk is full, or cannot be written.
        """
        gone = _opened(statistics)
        if not len(gone):
            raise ArgumentError("statistics is of no samples: there is nothing to forget")
        what = f"shard {shard_id!r}"
        with change(self._records, self._folder) as current:
            row = self._row(current.transaction, shard_id)
            total = self._sum(current.transaction)
            assert isinstance(total, StatisticsSum)
            shard, label = self._read(self._kind.load, row)
            shard.meta.check_same(gone.meta, "the statistic of the samples to forget")
            if shard.digests is None:
                raise StatisticsError(
                    f"{what} was added without the list of its samples: forget it as a whole"
                )
            if gone.digests is None:
                raise StatisticsError(
                    f"the samples to forget cannot be looked up in {what}: their statistics are "
                    "without a list of samples. Compute them with tangent_ops.statistics"
                )
            try:
                left = shard - gone
            except StatisticsError as error:
                raise StatisticsError(f"{what}: {error}") from error
            if len(left):
                total.subtract_samples(gone)
                current.replace_shard(row, left, Label(shard_id, len(left), label.meta))
            else:
                total.subtract(shard, label)
                current.remove_shard(row)
            current.set_sum(total)

    def statistics(self, *, without: str | None = None) -> TangentStatistics:
        """The sum of the present shards' statistics, without a list of samples.

        Args:
            without: a present shard that is left out: the same bits as after `forget` of it, but
                the ledger does not change.

        Raises:
            LedgerError: no shard is left, there is no such shard, or a file is damaged.
        """
        total = self._without(without)
        assert isinstance(total, StatisticsSum)
        if total.total is None:
            raise LedgerError(f"{self.path} is empty: there is nothing to compose")
        return total.total

    def solve(self, l2: float) -> SolvedDelta:
        """The optimum on all present samples; see `TangentStatistics.solve`.

        Raises:
            ArgumentError: l2 is negative or not finite.
            LedgerError: as in `statistics`.
            StatisticsError: no samples; or a condition number at which float64 gives nothing.
        """
        return self.statistics().solve(l2)

    def solve_path(self, l2s: Sequence[float]) -> list[PathRow]:
        """The optimum for each l2, with what chooses among them; see `PathRow`.

        Raises:
            ArgumentError: no l2, or as in `solve`.
            LedgerError: as in `statistics`.
            StatisticsError: as in `solve`.
        """
        return self.statistics().solve_path(l2s)

    def choose(self, l2s: Sequence[float] = TRIED) -> PathRow:
        """The optimum with the l2 that `TangentStatistics.choose` takes.

        Raises:
            ArgumentError, LedgerError, StatisticsError: as in `solve_path`.
        """
        return self.statistics().choose(l2s)

    def list(self) -> list[StatisticsEntry]:
        """The present shards, in the order in which they were added.

        Raises:
            LedgerError: a shard's file is missing, damaged or was edited.
        """
        return [
            StatisticsEntry(row.shard, int(label.weight), row.added, label.meta)
            for row, label in self._labels()
        ]

    def verify(self, *, progress: bool = True) -> VerifiedStatistics:
        """Check every file and add up the statistics again, one in memory at a time.

        The ledger is locked against changes meanwhile.

        Args:
            progress: show a bar if it takes more than two seconds.

        Raises:
            LedgerError: there are problems; the message names each of them and the way out.
        """
        found = self._verify(progress)
        return VerifiedStatistics(found.shards, int(found.weight), found.bytes)


def _opened(statistics: TangentStatistics | str | os.PathLike[str]) -> TangentStatistics:
    if isinstance(statistics, (str, os.PathLike)):
        return load_statistics(statistics)
    if not isinstance(statistics, TangentStatistics):
        kind = type(statistics).__name__
        raise ArgumentError(f"statistics must be TangentStatistics or a path, got a {kind}")
    check_statistics(statistics, "statistics")
    return statistics
