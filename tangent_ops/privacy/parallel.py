"""Privacy of deltas that were trained on disjoint shards: the worst shard's, not the sum.

A sample is in one shard, so one delta alone depends on it, and everything that is computed from
the deltas costs it no more than that delta: for each delta, epsilon is the largest over the shards
(McSherry, "Privacy integrated queries", SIGMOD 2009, theorem 4).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.ledger import Ledger
from tangent_ops.privacy.statement import ADD_OR_REMOVE, PrivacyStatement, statement_of

ASSUMES = (
    "which shard a sample belongs to is fixed by the sample alone, and no sample is in two",
    "a shard's delta depends on no other shard's samples: not by its hyperparameters, nor by a "
    "choice among several trained deltas",
    "the weights of a composition do not depend on the samples, nor on how many there are",
)


@dataclass(frozen=True)
class ParallelPrivacy:
    """What the release of all shards' deltas, and of anything computed from them, promises.

    Attributes:
        statements: shard -> its statement; None for a shard whose training promises nothing.
    """

    statements: dict[str, PrivacyStatement | None]

    @property
    def missing(self) -> tuple[str, ...]:
        """The shards without a statement."""
        return tuple(shard for shard, found in self.statements.items() if found is None)

    @property
    def delta(self) -> float | None:
        """The smallest delta among the statements; None if there is no statement."""
        return min((one.delta for one in self.statements.values() if one), default=None)

    @property
    def epsilon(self) -> float:
        """At `delta`; inf if a shard has no statement."""
        return math.inf if self.delta is None else self.epsilon_at(self.delta)

    def epsilon_at(self, delta: float) -> float:
        """The largest epsilon of any shard at that delta; inf if a shard has no statement."""
        shards = self.statements.values()
        return max(math.inf if one is None else one.epsilon_at(delta) for one in shards)

    def to_json(self, delta: float | None = None) -> str:
        """For programs: epsilon at `delta`, or at its own; an infinite one is the string "inf"."""
        return json.dumps(self._record(delta), indent=2, ensure_ascii=False, allow_nan=False)

    def describe(self, delta: float | None = None) -> str:
        """For people: what is promised at `delta`, or at its own."""
        return "\n".join(self._lines(self.delta if delta is None else delta))

    def __str__(self) -> str:
        return self.describe()

    def _record(self, delta: float | None) -> dict[str, object]:
        delta = self.delta if delta is None else delta
        return {
            "delta": delta,
            "epsilon": _written(math.inf if delta is None else self.epsilon_at(delta)),
            "adjacency": ADD_OR_REMOVE,
            "missing": list(self.missing),
            "shards": {
                shard: one and {
                    "epsilon": _written(one.epsilon_at(delta)) if delta else None,
                    "statement": json.loads(one.to_json()),
                }
                for shard, one in self.statements.items()
            },
            "assumes": list(ASSUMES),
        }

    def _lines(self, delta: float | None) -> list[str]:
        count = len(self.statements)
        epsilons = {
            shard: math.inf if one is None or delta is None else one.epsilon_at(delta)
            for shard, one in self.statements.items()
        }
        largest = max(epsilons.values())
        lines = []
        if self.missing:
            lines += [
                f"No privacy is promised: {len(self.missing)} of {count} shards have no statement.",
                f"  without one: {_few(self.missing)}",
            ]
        else:
            worst = max(epsilons, key=lambda shard: epsilons[shard])
            lines += [
                f"({largest:.4g}, {delta:g})-differential privacy for each sample of {count} "
                "shards.",
                "  Whoever sees all the deltas, and all their compositions, learns as much of a "
                "sample as from its own shard's delta.",
                f"  The largest epsilon counts, not the sum: that of {worst!r}.",
            ]
        return lines


@dataclass(frozen=True)
class LedgerPrivacy(ParallelPrivacy):
    """Of the shards that are present in a ledger.

    Attributes:
        forgotten: ids that were there, and are not.
        again: ids that were added more than once.
    """

    forgotten: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
