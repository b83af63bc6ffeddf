"""The ledger: a folder of shards' deltas with their weighted mean, and exact forgetting."""

from tangent_ops.composition.ledger.ledger import Entry, Ledger
from tangent_ops.composition.ledger.records import Event
from tangent_ops.composition.ledger.verify import Verified

__all__ = ["Entry", "Event", "Ledger", "Verified"]
