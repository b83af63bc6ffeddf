"""Attention by eager formulas in a plain dual level, a block of its scores at a time.

Neither pass keeps an N x M matrix for the other, as the fused kernels do not; on a CPU a block
stays in its cache, and causal attention computes little of what it hides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tangent_ops.ops.backend import no_autocast, save_for_tangents
from tangent_ops.ops.reference.attention_in_place import attention_jvp, attention_vjp

At = tuple[slice, slice, slice]  # of the batch, of the heads, of rows

_CACHED = 2**18  # scores of a block for each thread of a CPU: 1 MiB of float32
_FEWEST_ROWS = 32  # of a block: fewer make slow products
_CAUSAL_ROWS = 128  # at most: half of the scores on the diagonal are for nothing


def batch_and_heads_agree(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all three are (B, H, rows, cols) with the same B and H."""
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2]
    return alike and query.ndim == key.ndim == value.ndim == 4


class AttentionInParts(torch.autograd.Function):
    """Attention and its tangent, (B, H, N, Dv), differentiable by the tangents."""

    @staticmethod
    def forward(ctx, query, key, value, query_t, key_t, value_t, scale, is_causal):
        output, output_t = (_empty_heads(query, value.shape[-1]) for _ in range(2))
        with no_autocast(query.device.type):  # the operands are cast already
            for rows, keys, causal_from in _blocks(query, key, is_causal):
                primals = _flat(query, rows), _flat(key, keys), _flat(value, keys)
                tangents = _flat(query_t, rows), _flat(key_t, keys), _flat(value_t, keys)
                found, found_t = attention_jvp(*primals, *tangents, scale, causal_from)
                _put(output, rows, found)
                _put(output_t, rows, found_t)
        save_for_tangents(ctx, output, query, key, value)
        ctx.scale, ctx.is_causal = scale, is_causal
        return output, output_t

    @staticmethod
    def backward(ctx, _, grad):
        if grad is None:
            return (None,) * 8
        query, key, value = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:6]
        # Keys meet several blocks of rows: their gradients are sums, and rounded once.
        sums = torch.promote_types(query.dtype, torch.float32)
        grads = [
            _empty_heads(x, x.shape[-1], dtype) if need else None
            for x, dtype, need in zip((query, key, value), (None, sums, sums), needs, strict=True)
        ]
        if ctx.is_causal:  # not every block sees every key
            for total in grads[1:]:
                if total is not None:
                    total.zero_()
        with no_autocast(query.device.type):
            for rows, keys, causal_from in _blocks(query, key, ctx.is_causal):
                primals = _flat(query, rows), _flat(key, keys), _flat(value, keys)
                cotangent = _flat(grad, rows)
                found = attention_vjp(*primals, cotangent, ctx.scale, causal_from, needs)
                add = ctx.is_causal or rows[2].start > 0
                _put(grads[0], rows, found[0])
                _put(grads[1], keys, found[1], add)
                _put(grads[2], keys, found[2], add)
        grads = [None if total is None else total.to(query.dtype) for total in grads]
        return None, None, None, *grads, None, None


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[At, At, int | None]]:
    """Where a block's queries and its keys are, and the first row's position if it is causal.

    A single one where memory is not a CPU's. On a CPU one has work for every thread, and as many
    heads, rows and images, in this order, as fit the caches.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if batch * heads == 0:
        return
    images, some, tall = batch, heads, rows
    if query.device.type == "cpu":
        threads = torch.get_num_threads()
        cached = _CACHED * threads
        some = min(heads, max(2 * threads, cached // (rows * keys)))
        tall = min(rows, max(_FEWEST_ROWS, cached // (some * keys)))
        if is_causal:
            tall = min(tall, _CAUSAL_ROWS)
        whole = some == heads and tall == rows
        # Images are joined by copying them: for small ones only, where calls cost more.
        images = max(1, cached // 4 // (heads * rows * keys)) if whole else 1
    for image, head, row in itertools.product(
        range(0, batch, images), range(0, heads, some), range(0, rows, tall)
    ):
        lead = slice(image, image + images), slice(head, head + some)
        seen = min(row + tall, keys) if is_causal else keys
        yield (*lead, slice(row, row + tall)), (*lead, slice(seen)), row if is_causal else None


def _flat(tensor: Any, at: At) -> Any:
    """A block of (B, H, rows, cols) as (B * H, rows, cols), in float32 at least; None is None."""
    if tensor is None:
        return None
    tensor = tensor[at].flatten(0, 1)
    return tensor.float() if tensor.itemsize < 4 else tensor


def _put(whole: Tensor | None, at: At, block: Tensor | None, add: bool = False) -> None:
    if whole is not None and block is not None:
        place = whole[at]
        block = block.view(place.shape)
        place.add_(block) if add else place.copy_(block)


def _empty_heads(like: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, N, dim) in memory as (B, N, H, dim), so that merging the heads is free.

    No view: a model could not change what a Function returns as one in place.
    """
    shape = (*like.shape[:3], dim)
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=dtype or like.dtype, device=like.device)
