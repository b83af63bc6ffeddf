"""Which deltas a ledger accepts: those of one anchor, kind and layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_ops.delta import DeltaMeta, check_anchor, check_kind, check_layout
from tangent_ops.errors import ArgumentError, DeltaError
from tangent_ops.files import dtype_name, to_json

if TYPE_CHECKING:
    from tangent_ops.model.linearized import LinearizedModel

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class DeltaRules:
    """What the deltas of a ledger have in common; None where it is not fixed yet.

    Attributes:
        anchor: fingerprint of the anchor.
        model: the anchor's name, for messages.
        kind: rank and basis, as in `DeltaMeta`; (None, None) for full deltas.
        layout: name -> dtype and shape.
    """

    anchor: str | None = None
    model: str = "as given"
    kind: tuple[int | None, str | None] | None = None
    layout: Layout | None = None

    @classmethod
    def of_anchor(cls, anchor: str | LinearizedModel) -> DeltaRules:
        """The rules that a fingerprint, or a tangent model with its deltas, fixes.

        Raises:
            ArgumentError: anchor is neither.
        """
        if isinstance(anchor, str):
            return cls(anchor)
        if not hasattr(anchor, "fingerprint"):
            kind = type(anchor).__name__
            raise ArgumentError(f"anchor must be a fingerprint or a LinearizedModel, got a {kind}")
        kind = (anchor.rank, anchor.basis_fingerprint)
        return cls(anchor.fingerprint, anchor.model_name, kind, _layout(anchor.deltas()))

    @classmethod
    def of_delta(cls, delta: Mapping[str, Tensor], meta: DeltaMeta | None) -> DeltaRules:
        """The rules that a delta fixes; without meta its anchor and kind stay open."""
        if meta is None:
            return cls(layout=_layout(delta))
        return cls(meta.anchor, meta.model, (meta.rank, meta.basis), _layout(delta))

    def joined(self, other: DeltaRules, what: str) -> DeltaRules:
        """These rules, and those of `other` where these are open.

        Raises:
            DeltaError: the two differ; `what` names the other in the message.
        """
        if self.anchor is not None and other.anchor is not None:
            meta = DeltaMeta(other.anchor, other.model, "")
            check_anchor(meta, self.anchor, self.model, what)
        if self.kind is not None and other.kind is not None:
            rank, basis = other.kind
            check_kind(DeltaMeta("", "", "", rank=rank, basis=basis), *self.kind, what)
        if self.layout is not None and other.layout is not None:
            _check_layout(other.layout, self.layout, what)
        known = self if self.anchor is not None else other
        return DeltaRules(
            known.anchor,
            known.model,
            self.kind if self.kind is not None else other.kind,
            self.layout if self.layout is not None else other.layout,
        )

    def to_json(self) -> str:
        """One line for a file's header."""
        layout = self.layout and {
            name: [dtype_name(dtype), list(shape)] for name, (dtype, shape) in self.layout.items()
        }
        return to_json([self.anchor, self.model, self.kind, layout])

    @classmethod
    def from_json(cls, line: str) -> DeltaRules:
        """What `to_json` wrote."""
        anchor, model, kind, layout = json.loads(line)
        if layout is not None:
            layout = {
                name: (getattr(torch, dtype), tuple(shape))
                for name, (dtype, shape) in layout.items()
            }
        return cls(anchor, model, kind and tuple(kind), layout)


def _check_layout(layout: Layout, expected: Layout, what: str) -> None:
    check_layout(_empty(layout), _empty(expected), what)
    for name, (dtype, _) in expected.items():
        found = layout[name][0]
        if found != dtype:
            raise DeltaError(
                f"{what}: {name} is {dtype_name(found)}, the ledger's {dtype_name(dtype)}: "
                "convert it, or start another ledger"
            )


def _layout(delta: Mapping[str, Tensor]) -> Layout:
    return {name: (value.dtype, tuple(value.shape)) for name, value in delta.items()}


def _empty(layout: Layout) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in layout.items()
    }
