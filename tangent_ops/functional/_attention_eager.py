"""Unmasked attention by eager formulas in a plain dual level, a part of the batch at a time.

Neither pass keeps an N x M matrix for the other, as the fused kernels do not; on a CPU the
matrices of one part stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tangent_ops.functional._backend import save_for_tangents
from tangent_ops.reference.attention_in_place import attention_jvp, attention_vjp

_CACHED = 2**18  # scores of one part on a CPU: 1 MiB of float32


def batch_and_heads_agree(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all three are (B, H, rows, cols) with the same B and H."""
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2]
    return alike and query.ndim == key.ndim == value.ndim == 4


class AttentionInParts(torch.autograd.Function):
    """Attention and its tangent, (B, H, N, Dv), differentiable by the tangents."""

    @staticmethod
    def forward(ctx, query, key, value, query_t, key_t, value_t, scale):
        output, output_t = (_empty_heads(query, value.shape[-1]) for _ in range(2))
        with torch.autocast(query.device.type, enabled=False):  # the operands are cast already
            for part in _parts(query, key):
                operands = _flat(part, query, key, value, query_t, key_t, value_t)
                _store((output, output_t), part, attention_jvp(*operands, scale=scale))
        save_for_tangents(ctx, output, query, key, value, output)
        ctx.scale = scale
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return (None,) * 7
        query, key, value, output = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:6]
        grads = [
            _empty_heads(x, x.shape[-1]) if need else None
            for x, need in zip((query, key, value), needs, strict=True)
        ]
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query, key):
                operands = _flat(part, query, key, value, output, grad)
                _store(grads, part, attention_vjp(*operands, scale=ctx.scale, needs=needs))
        return None, None, None, *grads, None


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Slices of the batch; a single one where memory is not a CPU's."""
    batch, heads, rows = query.shape[:3]
    size = batch
    if query.device.type == "cpu":
        size = max(1, _CACHED // max(1, heads * rows * key.shape[2]))
    return (slice(start, start + size) for start in range(0, batch, size))


def _flat(part: slice, *tensors: Tensor | None) -> list[Any]:
    """Parts of (B, H, rows, cols) as (part of B * H, rows, cols), in float32 at least."""

    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor[part].flatten(0, 1)
        return tensor.float() if tensor.itemsize < 4 else tensor

    return [None if tensor is None else flat(tensor) for tensor in tensors]


def _store(wholes: Iterable[Tensor | None], part: slice, found: Iterable[Tensor | None]) -> None:
    for whole, one in zip(wholes, found, strict=True):
        if whole is not None and one is not None:
            whole[part] = one.view(whole[part].shape)


def _empty_heads(like: Tensor, dim: int) -> Tensor:
    """(B, H, N, dim) in memory as (B, N, H, dim), so that merging the heads is free."""
    batch, heads, rows, _ = like.shape
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)
