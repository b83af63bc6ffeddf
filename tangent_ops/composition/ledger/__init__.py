"""Ledgers: folders of shards' deltas or statistics with their exact sum, and exact forgetting."""

from tangent_ops.composition.ledger.ledger import Entry, Ledger
from tangent_ops.composition.ledger.opening import open_ledger
from tangent_ops.composition.ledger.records import Event
from tangent_ops.composition.ledger.statistics_ledger import (
    StatisticsEntry,
    StatisticsLedger,
    VerifiedStatistics,
)
from tangent_ops.composition.ledger.verify import Verified

__all__ = [
    "Entry",
    "Event",
    "Ledger",
    "StatisticsEntry",
    "StatisticsLedger",
    "Verified",
    "VerifiedStatistics",
    "open_ledger",
]
