"""Which statistics a ledger accepts: of one anchor, basis, layout, loss and list of classes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tangent_ops.composition.statistics import StatisticsMeta, layout_of
from tangent_ops.errors import ArgumentError, StatisticsError, few
from tangent_ops.files import to_json

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel


@dataclass(frozen=True)
class StatisticsRules:
    """What the statistics of a ledger have in common; None where it is not fixed yet.

    Attributes:
        anchor: fingerprint of the anchor.
        basis: rank and fingerprint of the basis, as in `DeltaMeta`.
        layout: name -> dtype and shape of the delta's tensors.
        meta: that of the first statistics, which fixes everything.
    """

    anchor: str | None = None
    basis: tuple[int | None, str | None] | None = None
    layout: dict[str, tuple[str, tuple[int, ...]]] | None = None
    meta: StatisticsMeta | None = None

    @classmethod
    def of_anchor(cls, anchor: str | LinearizedModel) -> StatisticsRules:
        """The rules that a fingerprint, or a tangent model with its deltas, fixes.

        Raises:
            ArgumentError: anchor is neither.
        """
        if isinstance(anchor, str):
            return cls(anchor)
        if not hasattr(anchor, "fingerprint"):
            kind = type(anchor).__name__
            raise ArgumentError(f"anchor must be a fingerprint or a LinearizedModel, got a {kind}")
        layout = {name: (dtype, shape) for name, dtype, shape in layout_of(anchor.deltas())}
        return cls(anchor.fingerprint, (anchor.rank, anchor.basis_fingerprint), layout)

    @classmethod
    def of_statistics(cls, meta: StatisticsMeta) -> StatisticsRules:
        """The rules that statistics fix."""
        delta = meta.delta
        layout = {name: (dtype, shape) for name, dtype, shape in meta.layout}
        return cls(delta.anchor, (delta.rank, delta.basis), layout, meta)

    def joined(self, other: StatisticsRules, what: str) -> StatisticsRules:
        """These rules, and those of `other` where these are open.

        Raises:
            StatisticsError: the two differ; `what` names the other in the message.
        """
        if self.meta is not None and other.meta is not None:
            self.meta.check_same(other.meta, what)
        for name in ("anchor", "basis", "layout"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                raise StatisticsError(
                    f"{what} has another {name}: {_named(theirs, mine)}, the ledger's is "
                    f"{_named(mine, theirs)}. Compute the statistics with the ledger's model, or "
                    "start another ledger"
                )
        return StatisticsRules(
            self.anchor if self.anchor is not None else other.anchor,
            self.basis if self.basis is not None else other.basis,
            self.layout if self.layout is not None else other.layout,
            self.meta if self.meta is not None else other.meta,
        )

    def to_json(self) -> str:
        """One line for a file's header, without `meta`."""
        return to_json([self.anchor, self.basis, self.layout])

    @classmethod
    def from_json(cls, line: str, meta: StatisticsMeta | None) -> StatisticsRules:
        """What `to_json` wrote, with meta."""
        anchor, basis, layout = json.loads(line)
        if layout is not None:
            layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
        return replace(cls(anchor, basis and tuple(basis), layout), meta=meta)


def _named(value: object, other: object) -> str:
    """A fingerprint, basis or layout in a message, where it differs from the other."""
    if isinstance(value, dict) and isinstance(other, dict):
        different = sorted(n for n in value.keys() | other.keys() if value.get(n) != other.get(n))
        return few(f"{name} {value.get(name, 'missing')}" for name in different)
    if isinstance(value, tuple):
        return "none" if value[1] is None else f"{value[1][:12]}"
    return str(value)[:12]
