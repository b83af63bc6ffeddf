"""Calls of the attention kernels, and their check against float64 MATH."""

from __future__ import annotations

from typing import Any

import torch
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
)
from torch import Tensor

from tests.ops import oracle


def packed(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    """A slice of timm's packed (B, N, 3, H, D) projection, seen as (B, H, N, D)."""
    return torch.randn(batch, rows, 3, heads, dim, **kind)[:, :, 1].transpose(1, 2)


def contiguous(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(batch, heads, rows, dim, **kind)


def one_batch_for_all(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(heads, rows, dim, **kind).expand(batch, heads, rows, dim)


def strided_last(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(batch, heads, rows, 2 * dim, **kind)[..., ::2]


def ragged(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    """Strides that are no multiples of 8."""
    return torch.randn(batch, heads, rows, dim + 3, **kind)[..., :dim]


LAYOUTS = [packed, contiguous, one_batch_for_all, strided_last, ragged]


def make_mask(name: str, shape: tuple[int, ...], **kind) -> Tensor | None:
    """A mask for scores (B, H, N, M), of size 1 where it is broadcast; every row keeps a key."""
    if name == "none":
        return None
    batch, heads, rows, cols = shape
    sizes = {
        "boolean": (batch, 1, rows, cols),
        "bias of heads": (1, heads, rows, cols),
        "bias of keys": (batch, 1, 1, cols),
        "bias of queries": (1, heads, rows, 1),
        "one bias": (1, 1, 1, 1),
        "with -inf": (1, heads, rows, cols),
    }
    if name == "boolean":
        mask = torch.rand(sizes[name], device=kind["device"]) > 0.3
        mask[..., 0] = True
        return mask
    mask = torch.randn(sizes[name], **kind)
    if name == "with -inf":
        mask[torch.rand(sizes[name], device=kind["device"]) > 0.7] = -torch.inf
        mask[..., -1] = 0.0
    return mask


MASKS = ["boolean", "bias of heads", "bias of keys", "with -inf"]


def run(call: Call, tangents: list[Tensor | None], grad: Tensor, grad_t: Tensor) -> tuple[Any, ...]:
    """Forward, both orders of backward; every element that is returned was written."""
    needs_mask = call.mask is not None and call.mask.is_floating_point()
    needs = (True, True, True, needs_mask)
    needs_t = tuple(t is not None for t in tangents)
    with oracle.poison():
        output, output_t, lse, mu = attention_jvp(call, *tangents)
        primal, tangent = attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, grad, grad_t,
            needs, needs_t,
        )  # fmt: skip
        first = attention_vjp(call, output, lse, grad_t, needs_t)
    tangent_rows = [rows for grads in tangent[:3] if grads is not None for rows in grads]
    for one in (output, *output_t, *primal[:3], *tangent_rows):
        assert one is not None and one.transpose(1, 2).is_contiguous()
    written = [[x for x in grads if x is not None] for grads in (primal, tangent, first)]
    return output, output_t, *written


def check(call: Call, tangents, grad, grad_t) -> None:
    """The kernels err at most twice as much as eager MATH in the same dtype, plus rounding.

    Where eager MATH overflows in 16 bits, its gradients in float32 are compared with.
    """
    primals = (call.query, call.key, call.value, call.mask)
    options = {
        "is_causal": call.is_causal,
        "scale": call.scale,
        "enable_gqa": call.query.shape[1] != call.key.shape[1],
    }
    found = run(call, tangents, grad, grad_t)
    wide = oracle.double([primals, tangents, grad, grad_t])
    exact = oracle.attention_derivatives(*wide, **options)
    eager = oracle.attention_derivatives(primals, tangents, grad, grad_t, **options)
    query, key = call.query.double(), call.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = float((call.scale * query @ key.mT).abs().max())
    oracle.assert_as_good_as(found[:2], exact[:2], eager[:2], scores)
    in_float32 = eager
    with oracle.rounding_as_it_goes():
        eager = oracle.attention_derivatives(primals, tangents, grad, grad_t, **options)
    eager = oracle.where_finite(eager, in_float32)
    # By a row of one key, say, the derivatives are 0: scale (dP - δ) k with dP = δ, which are sums
    # over R tangents of (1 + S_t) dO·v, for operands of size 1. Eager PyTorch may find that 0.
    dim, dim_v, count = call.query.shape[-1], call.value.shape[-1], len(grad_t)
    tangent_score = call.scale * (2 * dim) ** 0.5
    terms = call.scale * dim_v**0.5 * (1 + count**0.5 * (1 + tangent_score))
    # The tangents' gradients are those of first order: a map linear in them has one transpose.
    oracle.assert_as_good_as(
        found[2:], (*exact[2:], exact[3]), (*eager[2:], eager[3]), scores, terms
    )


def make_call(query, key, value, mask=None, scale=0.125, causal=False) -> Call:
    return Call(query, key, value, mask, None, scale, 0.0, causal)


def tangents_like(primals, count: int, present) -> list[Tensor | None]:
    return [
        torch.randn(count, *x.shape, dtype=x.dtype, device=x.device)
        if here and x is not None and x.is_floating_point()
        else None
        for x, here in zip(primals, present, strict=True)
    ]


def problem(
    query: tuple[int, ...],
    key: tuple[int, ...],
    dim_v: int,
    mask: Tensor | None = None,
    make=contiguous,
    count: int = 1,
    causal: bool = False,
    **kind,
) -> tuple[Call, list[Tensor | None], Tensor, Tensor]:
    """A call, ``count`` tangents of every operand, and the cotangents of output and tangents.

    Args:
        query: shape (B, H, N, D).
        key: shape (B, H', M, D).
        dim_v: head dimension of the value.
        mask: of the scores, or None.
        make: one of LAYOUTS, for operands and the output's cotangent.
        count: tangents of each operand.
        causal: whether the call is.
        **kind: dtype and device.
    """
    operands = [make(*shape, **kind) for shape in (query, key, (*key[:3], dim_v))]
    tangents = tangents_like((*operands, mask), count, (True,) * 4)
    grad = make(*query[:3], dim_v, **kind)
    grad_t = torch.randn(count, *grad.shape, **kind)
    return make_call(*operands, mask, causal=causal), tangents, grad, grad_t


def assert_close(found: Tensor | None, exact: Tensor) -> None:
    """To 1e-5 of the norm: a few dozen roundings of float32."""
    assert found is not None and oracle.error(found, exact) < 1e-5 * float(exact.norm())
