"""Models that change attention's output in place, where gradients are wanted.

The oracle is PyTorch's MATH attention in float64, the same change made out of place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops import scaled_dot_product_attention
from tests.ops.oracle import math_attention

BATCH, HEADS, TOKENS, DIM = 2, 4, 5, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()},
    "additive": {"attn_mask": torch.linspace(-1, 1, TOKENS).double()},
    "grouped": {"enable_gqa": True},
}
Change = Callable[[Tensor, Tensor], Tensor]


def add_merged(o: Tensor, x: Tensor) -> Tensor:
    y = o.transpose(1, 2).flatten(2)
    y += x
    return y


def scale(o: Tensor, x: Tensor) -> Tensor:
    return o.mul_(2.0).transpose(1, 2).flatten(2)


def overwrite(o: Tensor, x: Tensor) -> Tensor:
    y = o.transpose(1, 2)
    y[:, 0] = 0.0
    return y.flatten(2)


def _first_zeroed(o: Tensor, x: Tensor) -> Tensor:
    kept = torch.arange(TOKENS) > 0
    return o.transpose(1, 2).flatten(2) * kept[:, None]


CHANGES: dict[Change, Change] = {
    add_merged: lambda o, x: o.transpose(1, 2).flatten(2) + x,
    scale: lambda o, x: (2.0 * o).transpose(1, 2).flatten(2),
    overwrite: _first_zeroed,
}


def layer(attention, change: Change, options: dict[str, Any], x: Tensor, w: Tensor) -> Tensor:
    heads = (x @ w).view(BATCH, TOKENS, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    query, key, value = heads.unbind(0)
    if "enable_gqa" in options:
        key, value = key[:, :2], value[:, :2]
    return change(attention(query, key, value, **options), x)


def weighed(y: Tensor, y_t: Tensor) -> Tensor:
    return y.sin().sum() + (y_t * y_t).sum()


def by_dual_level(f, w: Tensor, w_t: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        y, y_t = forward_ad.unpack_dual(f(forward_ad.make_dual(w, w_t)))
        return y, y_t


def by_jvp(f, w: Tensor, w_t: Tensor) -> tuple[Tensor, Tensor]:
    y, y_t, *_ = torch.func.jvp(f, (w,), (w_t,))
    return y, y_t


@pytest.mark.parametrize("way", [by_dual_level, by_jvp])
@pytest.mark.parametrize("wanted", ["tangent", "input", "weight"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, change, wanted, way) -> None:
    source = torch.Generator().manual_seed(0)
    width = HEADS * DIM
    shapes = {"input": (BATCH, TOKENS, width), "weight": (width, 3 * width)}
    operands = {n: torch.randn(s, generator=source).double() for n, s in shapes.items()}
    operands["tangent"] = torch.randn(shapes["weight"], generator=source).double()
    operands["weight"] /= width**0.5
    leaf = operands[wanted].requires_grad_()
    x, w, w_t = (operands[n] for n in ("input", "weight", "tangent"))

    def ours(w):
        return layer(scaled_dot_product_attention, change, OPTIONS[name], x, w)

    def in_words(w):
        return layer(math_attention, CHANGES[change], OPTIONS[name], x, w)

    answers = []
    for pair in (way(ours, w, w_t), by_jvp(in_words, w, w_t)):
        answers.append((*pair, torch.autograd.grad(weighed(*pair), leaf)[0]))
    # A few hundred float64 roundings of sums of up to 96 terms.
    torch.testing.assert_close(*answers, rtol=1e-11, atol=1e-11)


def test_grad_of_jvp() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, HEADS * DIM, generator=source).double()
    w, w_t = torch.randn(2, HEADS * DIM, 3 * HEADS * DIM, generator=source).double() / 6
    for change, out_of_place in CHANGES.items():
        answers = []
        for attention, one in (
            (scaled_dot_product_attention, change),
            (math_attention, out_of_place),
        ):

            def total(w, w_t, attention=attention, one=one):
                return weighed(*by_jvp(lambda w: layer(attention, one, {}, x, w), w, w_t))

            answers.append(torch.func.grad(total, argnums=(0, 1))(w, w_t))
        torch.testing.assert_close(*answers, rtol=1e-11, atol=1e-11)
