"""The checked operands and options of an attention call, for its launchers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_kernels._launch import arch_of, operand, readable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(8, 257, 8)


@dataclass(frozen=True)
class Call:
    """Primal operands and options of attention.

    Args:
        query: (B, H, N, D), float16, bfloat16 or float32; D a multiple of 8 from 8 to 256.
        key: (B, G, M, D), same dtype; G divides H.
        value: (B, G, M, Dv), same dtype; Dv likewise a multiple of 8 from 8 to 256.
        mask: boolean (True: attend) or additive, (B or 1, H or 1, N or 1, M or 1), or None.
        seed: int64 (B,), one dropout seed per batch element; or None.
        scale: factor of the scores.
        dropout_p: probability of dropping an attention weight; 0 without ``seed``.
        is_causal: query i attends to keys 0 to i only.
        target: compute capability to choose tiles for; None for that of the tensors' device.

    Raises:
        ValueError: an operand has a shape, dtype or device that the kernels do not support.
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
            object.__setattr__(self, name, readable(getattr(self, name)))
        check_call(self)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.query, self.key, self.value, self.mask, self.seed

    @property
    def options(self) -> tuple[Any, ...]:
        return self.scale, self.dropout_p, self.is_causal, self.target

    @property
    def arch(self) -> int:
        return arch_of(self.query) if self.target is None else self.target

    @property
    def shared(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    def arguments(self) -> dict[str, Any]:
        """The arguments of every attention kernel."""
        batch, heads, queries, _ = self.query.shape
        mask, mask_strides = self.mask_operand(self.mask)
        return {
            "q": operand(self.query),
            "k": operand(self.key),
            "v": operand(self.value),
            "mask": mask,
            "mask_b": mask_strides[1],
            "mask_h": mask_strides[2],
            "mask_row": mask_strides[3],
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

        A broadcast axis has stride 0, without a copy. Kernels take these strides as separate
        arguments: Triton specialises on the content of a tuple, and the strides depend on N.
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
        return self.seed, self.seed.stride(0)


@dataclass(frozen=True)
class Tangents:
    """R tangents of a call's operands, (R, ...) for the shapes in :class:`Call`.

    Raises:
        ValueError: a tangent differs from its operand in shape, dtype or device, or in R.
    """

    call: Call
    query_t: Tensor | None
    key_t: Tensor | None
    value_t: Tensor | None
    mask_t: Tensor | None

    def __post_init__(self):
        for name in ("query_t", "key_t", "value_t"):
            object.__setattr__(self, name, readable(getattr(self, name)))
        check_tangents(self)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.query_t, self.key_t, self.value_t, self.mask_t

    @property
    def count(self) -> int:
        """R; 0 if there is no tangent at all."""
        return next((x.shape[0] for x in self.operands if x is not None), 0)

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
            "mask_t_r": mask_t_strides[0],
            "mask_t_b": mask_t_strides[1],
            "mask_t_h": mask_t_strides[2],
            "mask_t_row": mask_t_strides[3],
        }


def check_call(call: Call) -> None:
    """Raise ValueError if the kernels do not support the call."""
    query = call.query
    for name, tensor in (("query", query), ("key", call.key), ("value", call.value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: expected (batch, heads, rows, D)")
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, query {query.dtype}: expected one dtype of "
                "float16, bfloat16, float32"
            )
        if tensor.shape[-1] not in HEAD_DIMS:
            raise ValueError(
                f"{name}'s head_dim is {tensor.shape[-1]}: expected a multiple of 8 from 8 to 256"
            )
        _check_device(name, tensor, query)
    batch, heads, queries, dim = query.shape
    keys = call.key.shape[2]
    groups = call.key.shape[1]
    if call.key.shape != (batch, groups, keys, dim) or heads % max(groups, 1):
        raise ValueError(
            f"key is {tuple(call.key.shape)}, query {tuple(query.shape)}: expected the same "
            "batch and head_dim, and key heads that divide the query heads"
        )
    if call.value.shape[:3] != (batch, groups, keys):
        raise ValueError(
            f"value is {tuple(call.value.shape)}, key {tuple(call.key.shape)}: expected the same "
            "batch, heads and rows"
        )
    if queries == 0 or keys == 0:
        raise ValueError(f"{queries} queries and {keys} keys: expected at least one of each")
    if call.mask is not None:
        _check_mask(call.mask, (batch, heads, queries, keys), query)
    if not 0.0 <= call.dropout_p < 1.0 or (call.dropout_p > 0.0) != (call.seed is not None):
        raise ValueError(
            f"dropout_p is {call.dropout_p}, seed {'absent' if call.seed is None else 'given'}: "
            "expected a probability in [0, 1), and a seed where it is not 0"
        )
    if call.seed is not None:
        if call.seed.dtype != torch.int64 or call.seed.shape != (batch,):
            raise ValueError(
                f"seed is {call.seed.dtype} {tuple(call.seed.shape)}: expected int64 {(batch,)}"
            )
        _check_device("seed", call.seed, query)


def check_tangents(tangents: Tangents) -> None:
    """Raise ValueError if a tangent does not fit its operand."""
    call = tangents.call
    for name in ("query", "key", "value", "mask"):
        tangent, tensor = getattr(tangents, f"{name}_t"), getattr(call, name)
        if tangent is None:
            continue
        if tensor is None or not tensor.is_floating_point():
            raise ValueError(f"{name}_t is given: expected None where {name} is absent or boolean")
        check_rows(f"{name}_t", tangent, name, tensor, tangents.count)


def check_rows(name: str, rows: Tensor, of_name: str, of: Tensor, count: int | None = None) -> None:
    """Raise ValueError unless ``rows`` is (R, *shape) for the tensor ``of``."""
    count = rows.shape[0] if count is None and rows.ndim else count
    if tuple(rows.shape) != (count, *of.shape) or rows.dtype != of.dtype:
        raise ValueError(
            f"{name} is {rows.dtype} {tuple(rows.shape)}: expected {of.dtype} "
            f"{(count, *of.shape)}, as {of_name} with R={count} in front"
        )
    _check_device(name, rows, of)


def _check_mask(mask: Tensor, scores: tuple[int, ...], query: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}: expected bool or floating point")
    fits = mask.ndim == 4 and all(
        size in (1, whole) for size, whole in zip(mask.shape, scores, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask is {tuple(mask.shape)}: expected {scores}, or 1 where it is broadcast"
        )
    _check_device("mask", mask, query)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: expected one")
