"""The running sum of the present shards' deltas, in fixed point, and its file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.delta_rules import DeltaRules
from tangent_ops.composition.ledger.fixed_point import (
    FRACTION_BITS,
    LIMIT,
    from_fixed,
    reach,
    to_fixed,
)
from tangent_ops.composition.ledger.kind import Label, RunningSum
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.delta import Delta, DeltaMeta, check_values
from tangent_ops.errors import LedgerError
from tangent_ops.files import to_json

FORMAT = "tangent-ops ledger sum"
FORMAT_VERSION = "1"

# Model, trainable and loss of a shard's DeltaMeta; None if the shard has no meta.
Origin = tuple[str, str, str | None] | None


@dataclass
class DeltaSum(RunningSum[Delta, DeltaRules]):
    """Exact sums over the present shards, which determine their weighted mean.

    Attributes:
        rules: what deltas may be added.
        terms: name -> int64 sum of the shards' terms.
        weight: sum of the weights.
        reach: sum of the shards' largest terms. It is at most `LIMIT`, so no sum over a subset of
            the shards overflows: not this one, nor what is left when some are forgotten.
        origins: how many shards have each origin.
    """

    rules: DeltaRules = field(default_factory=DeltaRules)
    terms: dict[str, Tensor] = field(default_factory=dict)
    weight: Fraction = Fraction(0)
    reach: int = 0
    origins: Counter[Origin] = field(default_factory=Counter)

    @classmethod
    def empty(cls, rules: DeltaRules | None = None) -> DeltaSum:
        """The sum of no shards."""
        return cls(rules or DeltaRules())

    @property
    def shards(self) -> int:
        """How many shards are in the sum."""
        return self.origins.total()

    @property
    def total_weight(self) -> float:
        """The weight, rounded."""
        return float(self.weight)

    def add(self, content: Delta, label: Label) -> None:
        """Add a shard.

        Raises:
            DeltaError: the delta breaks the rules.
            LedgerError: a sum would be out of range, or all terms of the delta would round to zero.
                Nothing was added.
        """
        what = f"shard {label.shard!r}"
        rules = self.rules.joined(DeltaRules.of_delta(content, content.meta), what)
        total = self.reach + reach(content, label.weight, what)
        if total > LIMIT:
            raise LedgerError(
                f"{what} would take the sum out of range: weight times largest value, over all "
                f"shards, comes to {total / 2**FRACTION_BITS:g}, beyond 2^23. Use smaller weights"
            )
        try:
            float(self.weight + Fraction(label.weight))
        except OverflowError as error:
            raise LedgerError(
                f"{what} makes the total weight infinite: use a smaller one"
            ) from error
        self.rules = rules
        self._change(content, label, sign=1)

    def subtract(self, content: Delta, label: Label) -> None:
        """Undo `add` with the same arguments."""
        self._change(content, label, sign=-1)
        self.origins = +self.origins  # drops origins with a count of zero

    def _change(self, delta: Delta, label: Label, sign: int) -> None:
        for name, value in delta.items():
            if name not in self.terms:
                self.terms[name] = torch.zeros(value.shape, dtype=torch.int64)
            self.terms[name].add_(to_fixed(value, label.weight), alpha=sign)
        self.weight += sign * Fraction(label.weight)
        self.reach += sign * reach(delta, label.weight, f"shard {label.shard!r}")
        meta = delta.meta
        self.origins[meta and (meta.model, meta.trainable, meta.loss)] += sign

    def mean(self) -> Delta:
        """The weighted mean, in the deltas' dtypes.

        Its meta is None if a shard has none. Otherwise it has the loss if all shards share it, and
        the alphabetically first of the shards' model names and patterns.

        Raises:
            DeltaError: a value is beyond its dtype's range.
        """
        layout = self.rules.layout or {}
        weight = float(self.weight)
        mean = {
            name: (from_fixed(self.terms[name]) / weight).to(layout[name][0])
            for name in sorted(self.terms)
        }
        check_values(mean, "the composition")
        origins = [origin for origin in self.origins if origin is not None]
        if len(origins) < len(self.origins) or self.rules.anchor is None:
            return Delta(mean, None)
        losses = {loss for _, _, loss in origins}
        rank, basis = self.rules.kind or (None, None)
        return Delta(
            mean,
            DeltaMeta(
                self.rules.anchor,
                model=min(model for model, _, _ in origins),
                trainable=min(trainable for _, trainable, _ in origins),
                loss=losses.pop() if len(losses) == 1 else None,
                rank=rank,
                basis=basis,
            ),
        )

    def differences(self, other: DeltaSum) -> list[str]:
        """The names, for a message, of what differs in `other`; the rules are not compared."""
        found = [
            f"the sum of {name}"
            for name in sorted(self.terms.keys() | other.terms.keys())
            if not _equal(self.terms.get(name), other.terms.get(name))
        ]
        found += ["the total weight"] if self.weight != other.weight else []
        found += ["the range"] if self.reach != other.reach else []
        return found + (["the shards' origins"] if self.origins != other.origins else [])

    def save(self, path: Path) -> Seal:
        """Write the file; it is synced to disk when this returns."""
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rules": self.rules.to_json(),
            "weight": str(self.weight),
            "reach": str(self.reach),
            "origins": to_json(sorted(([k, n] for k, n in self.origins.items()), key=to_json)),
        }
        sealed.write(path, self.terms, metadata)
        return sealed.seal(path)

    @classmethod
    def load(cls, folder: Path, seal: Seal) -> DeltaSum:
        """Read what `save` wrote.

        Raises:
            LedgerError: the file is missing, damaged, was edited, or is of a later format.
        """
        rules = cls.load_rules(folder, seal)
        terms, metadata = sealed.read(folder, seal)
        origins = json.loads(metadata["origins"])
        return cls(
            rules,
            terms,
            Fraction(metadata["weight"]),
            int(metadata["reach"]),
            Counter({origin and tuple(origin): count for origin, count in origins}),
        )

    @staticmethod
    def load_rules(folder: Path, seal: Seal) -> DeltaRules:
        """The rules in a file that `save` wrote, without reading the sums; raises as `load`."""
        return DeltaRules.from_json(sealed.header(folder, seal, FORMAT_VERSION)["rules"])

    @staticmethod
    def load_count(folder: Path, seal: Seal) -> int:
        """How many shards are in the sum, without reading it; raises as `load`."""
        return sum(
            count for _, count in json.loads(sealed.header(folder, seal, FORMAT_VERSION)["origins"])
        )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two sums are equal; a missing one counts as zeros."""
    if one is None or other is None:
        present = one if one is not None else other
        return present is None or not present.any()
    return torch.equal(one, other)
