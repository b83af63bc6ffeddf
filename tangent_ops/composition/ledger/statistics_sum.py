"""The running sum of the present shards' statistics, without lists of samples, and its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.kind import Label, RunningSum
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.composition.ledger.statistics_rules import StatisticsRules
from tangent_ops.composition.statistics import StatisticsMeta, TangentStatistics
from tangent_ops.errors import LedgerError

FORMAT = "tangent-ops ledger sum of statistics"
FORMAT_VERSION = "1"


@dataclass
class StatisticsSum(RunningSum[TangentStatistics, StatisticsRules]):
    """The sum of the present shards' statistics; its size does not depend on their samples.

    Attributes:
        rules: what statistics may be added.
        count: how many shards there are.
        total: the sum; None if there are none.
    """

    rules: StatisticsRules = field(default_factory=StatisticsRules)
    count: int = 0
    total: TangentStatistics | None = None

    @classmethod
    def empty(cls, rules: StatisticsRules | None = None) -> StatisticsSum:
        """The sum of no shards."""
        return cls(rules or StatisticsRules())

    @property
    def shards(self) -> int:
        """How many shards are in the sum."""
        return self.count

    @property
    def total_weight(self) -> float:
        """The number of samples."""
        return 0 if self.total is None else len(self.total)

    def add(self, content: TangentStatistics, label: Label) -> None:
        """Add a shard.

        Raises:
            StatisticsError: the statistics break the rules, or a sum would be out of range. Nothing
                was added.
        """
        rules = self.rules.joined(
            StatisticsRules.of_statistics(content.meta), f"shard {label.shard!r}"
        )
        own = content.without_list()
        self.total = own if self.total is None else self.total + own
        self.rules = rules
        self.count += 1

    def subtract(self, content: TangentStatistics, label: Label) -> None:
        """Undo `add` with the same arguments."""
        self.subtract_samples(content)
        self.count -= 1
        if not self.count:
            self.total = None

    def subtract_samples(self, gone: TangentStatistics) -> None:
        """Take some samples out of a shard that stays."""
        if self.total is None:
            raise LedgerError("the sum holds no samples")
        self.total -= gone.without_list()

    def differences(self, other: StatisticsSum) -> list[str]:
        """The names, for a message, of what differs in `other`; the rules are not compared."""
        if self.total is None or other.total is None:
            return [] if self.total is other.total else ["the sum"]
        found = [f"the sum of {name}" for name in self.total.differences(other.total)]
        return found + ([] if self.count == other.count else ["the number of shards"])

    def save(self, path: Path) -> Seal:
        """Write the file; it is synced to disk when this returns."""
        tensors, metadata = ({}, {}) if self.total is None else self.total.to_tensors()
        if self.rules.meta is not None:
            metadata["statistics"] = self.rules.meta.to_json()
        metadata |= {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rules": self.rules.to_json(),
            "shards": str(self.count),
        }
        sealed.write(path, tensors, metadata)
        return sealed.seal(path)

    @classmethod
    def load(cls, folder: Path, seal: Seal) -> StatisticsSum:
        """Read what `save` wrote.

        Raises:
            LedgerError: the file is missing, damaged, was edited, or is of a later format.
        """
        rules = cls.load_rules(folder, seal)
        tensors, metadata = sealed.read(folder, seal)
        total = TangentStatistics.from_tensors(tensors, metadata) if tensors else None
        return cls(rules, int(metadata["shards"]), total)

    @staticmethod
    def load_rules(folder: Path, seal: Seal) -> StatisticsRules:
        """The rules in a file that `save` wrote, without reading the sums; raises as `load`."""
        metadata = sealed.header(folder, seal, FORMAT_VERSION)
        line = metadata.get("statistics")
        meta = None if line is None else StatisticsMeta.from_json(line)
        return StatisticsRules.from_json(metadata["rules"], meta)

    @staticmethod
    def load_count(folder: Path, seal: Seal) -> int:
        """How many shards are in the sum, without reading it; raises as `load`."""
        return int(sealed.header(folder, seal, FORMAT_VERSION)["shards"])
