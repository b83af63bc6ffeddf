"""The operands of one attention call, in the form that every launcher of it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_kernels._launch import arch_of, operand, unit_last_stride


@dataclass(frozen=True)
class Call:
    """Primal operands and options of attention.

    Args:
        query: (B, H, N, D), float16, bfloat16 or float32; D a multiple of 8 from 8 to 256.
        key: (B, G, M, D), same dtype; G divides H.
        value: (B, G, M, Dv), same dtype; Dv likewise a multiple of 8 from 8 to 256.
        mask: boolean (True: attend) or additive, (B or 1, H or 1, N or 1, M or 1), or None.
        seed: int64 (B,) or (1,), for dropout; or None.
        scale: factor of the scores.
        dropout_p: probability of dropping an attention weight; 0 without ``seed``.
        is_causal: query i attends to keys 0 to i only.
        target: compute capability to choose tiles for; None for that of the tensors' device.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    is_causal: bool
    target: int | None = None

    statistics = torch.float32  # of lse, μ and the like

    def __post_init__(self):
        for name in ("query", "key", "value"):
            object.__setattr__(self, name, unit_last_stride(getattr(self, name)))

    @property
    def arch(self) -> int:
        return arch_of(self.query) if self.target is None else self.target

    @property
    def shared(self) -> int:
        """Query heads for each key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    def arguments(self) -> dict[str, Any]:
        """What every attention kernel takes."""
        batch, heads, queries, _ = self.query.shape
        mask, mask_strides = self.mask_operand(self.mask)
        return {
            "q": operand(self.query),
            "k": operand(self.key),
            "v": operand(self.value),
            "mask": mask,
            "mask_strides": mask_strides,
            "seed": self._seed_operand(),
            "batch": batch,
            "heads": heads,
            "shared": self.shared,
            "queries": queries,
            "keys": self.key.shape[2],
            "scale": float(self.scale),
            "dropout_p": float(self.dropout_p),
            "BOOLEAN": self.mask is not None and self.mask.dtype == torch.bool,
            "CAUSAL": self.is_causal,
        }

    def mask_operand(self, mask: Tensor | None) -> tuple[Any, tuple[int, ...]]:
        """(pointer, column stride) and strides over tangents, batch, heads and rows.

        A broadcast axis has stride 0: nothing is expanded in memory.
        """
        if mask is None:
            return None, (0, 0, 0, 0)
        lead = mask.shape[:-4]
        scores = (*self.query.shape[:3], self.key.shape[2])
        *outer, column = mask.expand(*lead, *scores).stride()
        bytes_ = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return (bytes_, column), tuple(outer if lead else (0, *outer))

    def _seed_operand(self) -> tuple[Tensor, int] | None:
        if self.seed is None:
            return None
        return self.seed, 0 if self.seed.shape[0] == 1 else self.seed.stride(0)


@dataclass(frozen=True)
class Tangents:
    """R tangents of a call's operands; see :class:`Call` for the shapes behind R."""

    call: Call
    query_t: Tensor | None
    key_t: Tensor | None
    value_t: Tensor | None
    mask_t: Tensor | None

    def __post_init__(self):
        for name in ("query_t", "key_t", "value_t"):
            object.__setattr__(self, name, unit_last_stride(getattr(self, name)))

    @property
    def count(self) -> int:
        """R; 0 if there is no tangent at all."""
        tangents = (self.query_t, self.key_t, self.value_t, self.mask_t)
        return next((x.shape[0] for x in tangents if x is not None), 0)

    @property
    def move_scores(self) -> bool:
        """Whether the scores have a tangent."""
        return any(x is not None for x in (self.query_t, self.key_t, self.mask_t))

    def arguments(self) -> dict[str, Any]:
        mask_t, mask_t_strides = self.call.mask_operand(self.mask_t)
        return {
            "q_t": operand(self.query_t),
            "k_t": operand(self.key_t),
            "v_t": operand(self.value_t),
            "mask_t": mask_t,
            "mask_t_strides": mask_t_strides,
        }
