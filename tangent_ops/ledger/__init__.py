"""The ledger: a folder of shards' deltas that gives their mean, and forgets a shard exactly."""

from tangent_ops.ledger.ledger import Entry, Ledger
from tangent_ops.ledger.records import Event
from tangent_ops.ledger.verify import Verified

__all__ = ["Entry", "Event", "Ledger", "Verified"]
