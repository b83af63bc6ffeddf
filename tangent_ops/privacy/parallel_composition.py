"""Privacy of deltas that were trained on disjoint shards: the largest ε of a shard, not the sum.

Each sample is in one shard and affects that shard's delta only. So for each δ, all deltas together
and whatever is computed from them have the largest ε of the shards (McSherry, "Privacy integrated
queries", SIGMOD 2009, theorem 4).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tangent_ops.composition.ledger import Ledger
from tangent_ops.errors import ArgumentError, CertificateError, LedgerError, UnsupportedError, few
from tangent_ops.privacy.statement import (
    ADD_OR_REMOVE,
    PrivacyStatement,
    check_adjacency,
    plain,
    promised,
    statement_of,
    table,
    written,
)

ASSUMES = (
    "which shard a sample is in depends on that sample alone, and no sample is in two",
    "a shard's delta and hyperparameters depend on no other shard's samples",
    "the weights of a composition depend on no sample, nor on how many there are",
)


@dataclass(frozen=True)
class ParallelPrivacy:
    """The guarantee for a release of all shards' deltas, and of anything computed from them.

    Attributes:
        statements: shard -> its statement; None for a shard without one.
    """

    statements: dict[str, PrivacyStatement | None]

    @property
    def missing(self) -> tuple[str, ...]:
        """The shards without a statement."""
        return tuple(shard for shard, one in self.statements.items() if one is None)

    @property
    def delta(self) -> float | None:
        """The smallest delta of a statement; None if no shard has a statement."""
        return min((one.delta for one in self.statements.values() if one), default=None)

    @property
    def epsilon(self) -> float:
        """The epsilon at `delta`; inf if a shard has no statement."""
        return math.inf if self.delta is None else self.epsilon_at(self.delta)

    def epsilon_at(self, delta: float) -> float:
        """The largest epsilon of a shard, from its phases; inf if a shard has no statement."""
        return max(self._epsilons(delta).values())

    def to_json(self) -> str:
        """All fields as JSON; an infinite epsilon is the string "inf"."""
        return json.dumps(self._record(), indent=2, ensure_ascii=False, allow_nan=False)

    def describe(self, delta: float | None = None) -> str:
        """The guarantee as text, at the given delta, or at `self.delta`."""
        return "\n".join(self._lines(delta))

    def __str__(self) -> str:
        return self.describe()

    def _epsilons(self, delta: float) -> dict[str, float]:
        return {
            shard: math.inf if one is None else one.epsilon_at(delta)
            for shard, one in self.statements.items()
        }

    def _record(self) -> dict[str, object]:
        return {
            "delta": self.delta,
            "epsilon": written(self.epsilon),
            "missing": list(self.missing),
            "shards": {
                shard: one and json.loads(one.to_json()) for shard, one in self.statements.items()
            },
            "assumes": list(ASSUMES),
        }

    def _lines(self, delta: float | None) -> list[str]:
        delta = self.delta if delta is None else delta
        count = len(self.statements)
        if self.missing or delta is None:
            return [
                f"No privacy is promised: {len(self.missing)} of {count} shards have no statement.",
                *table(("without", few(map(repr, self.missing)))),
            ]
        epsilons = self._epsilons(delta)
        worst = max(epsilons, key=lambda shard: epsilons[shard])
        statements = [one for one in self.statements.values() if one]
        advantage = max(one.failure_at(0.0) for one in statements)
        assumes = dict.fromkeys((*ASSUMES, *(text for one in statements for text in one.assumes)))
        return [
            *promised(epsilons[worst], delta, advantage, ADD_OR_REMOVE),
            *table(
                ("covers", f"all deltas of {count} shards, and whatever is computed from them"),
                (
                    "epsilon",
                    f"{plain(epsilons[worst])} (PLD) at delta = {delta:g}: shard {worst!r} has the "
                    "largest; they do not add up",
                ),
                *(("assumes", text) for text in assumes),
            ),
        ]


@dataclass(frozen=True)
class LedgerPrivacy(ParallelPrivacy):
    """The guarantee for the deltas of a ledger's present shards.

    Attributes:
        forgotten: ids of shards that were added, and are no longer present.
        again: ids of shards that were added more than once.
    """

    forgotten: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    def _record(self) -> dict[str, object]:
        history = {"forgotten": list(self.forgotten), "again": list(self.again)}
        return {**super()._record(), **history}

    def _lines(self, delta: float | None) -> list[str]:
        rows = []
        if self.forgotten:
            rows.append(
                (
                    "forgotten",
                    f"{few(map(repr, self.forgotten))}: not counted. What was published while they "
                    "were there costs their samples the epsilon of their own statements",
                )
            )
        if self.again:
            rows.append(
                (
                    "again",
                    f"{few(map(repr, self.again))}: added more than once; the present delta is "
                    "counted. If an earlier one was published, alone or composed, and had the same "
                    "samples, both count for them: earlier.then(later)",
                )
            )
        return super()._lines(delta) + table(*rows)


def parallel(statements: Mapping[str, PrivacyStatement | None]) -> ParallelPrivacy:
    """Compose the statements of disjoint shards; no sample ever changes its shard.

    Args:
        statements: shard -> the statement of its delta; None if it has none.

    Raises:
        ArgumentError: there is no shard, a value is no statement, or adjacencies differ.
        UnsupportedError: adjacency is not adding or removing a sample: replacing one may move it
            to another shard, and then two deltas change.
    """
    return ParallelPrivacy(_checked(statements))


def ledger_privacy(ledger: Ledger) -> LedgerPrivacy:
    """The guarantee of a ledger's deltas and compositions, from its present shards' files.

    Each statement is verified. The deltas' values are not read.

    Raises:
        LedgerError: the ledger is empty, or a shard's file is missing or damaged.
        CertificateError: a statement claims less than its phases give.
        ArgumentError: a statement cannot be read, or adjacencies differ.
        UnsupportedError: as in `parallel`.
    """
    statements: dict[str, PrivacyStatement | None] = {}
    for shard, meta in ledger.origins().items():
        try:
            statement = None if meta is None else statement_of(meta)
            if statement is not None:
                statement.verify()
        except (ArgumentError, CertificateError) as error:
            raise type(error)(f"shard {shard!r}: {error}") from error
        statements[shard] = statement
    if not statements:
        raise LedgerError(f"{ledger.path} is empty: add a delta with a privacy statement first")
    events = ledger.history()
    added = Counter(event.shard for event in events if event.what == "added")
    return LedgerPrivacy(
        _checked(statements),
        forgotten=tuple(shard for shard in added if shard not in statements),
        again=tuple(shard for shard, times in added.items() if times > 1),
    )


def _checked(
    statements: Mapping[str, PrivacyStatement | None],
) -> dict[str, PrivacyStatement | None]:
    if not isinstance(statements, Mapping) or not statements:
        raise ArgumentError(f"statements must map shards to statements, got {statements!r}")
    known = [one for one in statements.values() if one is not None]
    for shard, one in statements.items():
        if not (one is None or isinstance(one, PrivacyStatement)):
            kind = type(one).__name__
            raise ArgumentError(f"statements[{shard!r}] must be a statement or None, got a {kind}")
    for one in known:
        check_adjacency(known[0].adjacency, one.adjacency)
        if one.adjacency != ADD_OR_REMOVE:
            raise UnsupportedError(
                f"shards compose in parallel for {ADD_OR_REMOVE!r} only, got {one.adjacency!r}: "
                "a sample that is replaced may change its shard, and two deltas with it"
            )
    return dict(statements)
