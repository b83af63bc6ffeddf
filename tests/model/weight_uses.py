"""Uses of a weight in a model: a layer, a view, and functions that need the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small_models import Computes
from torch import Tensor, nn

from tangent_ops.ops.linear import head_linear


class Twice(torch.autograd.Function):
    """x ↦ 2 x; torch function modes do not see its calls."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

    @staticmethod
    def jvp(ctx, x_t):
        return 2 * x_t


def by_heads(m: Any, x: Tensor) -> Tensor:
    """Attention as one row per head: slices, views and transposes of one weight."""
    w, b = m.qkv.weight, m.qkv.bias
    q = F.linear(x[:, :1], w[:8], b[:8]).unflatten(-1, (2, 4))
    k, v = w[8:16].view(2, 4, 8), w[16:, :].view(2, 4, 8)
    rows = head_linear(q, k.mT)  # (B, 1, 2, 8)
    scores = torch.einsum("bqhk,bnk->bhqn", rows, x).softmax(-1)
    return head_linear((scores @ x[:, None]).transpose(1, 2), v, b[16:].view(2, 4)).flatten(1)


def in_chunks(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv.weight.chunk(3)
    first, rest = m.qkv.bias[:8], m.qkv.bias[8:]
    top, _ = torch.split(m.qkv.weight, [16, 8])
    product = F.linear(x, q, first) * F.linear(x, k)
    return torch.cat([torch.tanh(product), F.linear(x, v), F.linear(x, top, rest)], -1)


def own_attention(m: Any, x: Tensor) -> Tensor:
    return m.attention(x, x, x, need_weights=False)[0]


def qkv() -> dict[str, Any]:
    return {"qkv": nn.Linear(8, 24)}


def weight() -> dict[str, Any]:
    return {"weight": nn.Parameter(torch.randn(6, 8))}


# name -> (call, parts, whether the factors compute all of it)
USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, Any]], bool]] = {
    "linear": (lambda m, x: m.qkv(torch.tanh(m.first(x))),
               lambda: {"first": nn.Linear(8, 8), **qkv()}, True),
    "no bias": (lambda m, x: m.l(x), lambda: {"l": nn.Linear(8, 5, bias=False)}, True),
    "tied": (lambda m, x: m.l(torch.tanh(m.l(x))), lambda: {"l": nn.Linear(8, 8)}, True),
    "one dimension": (lambda m, x: torch.stack([F.linear(r, m.weight) for r in x[0]]), weight,
                      True),
    "heads": (by_heads, qkv, True),
    "chunks": (in_chunks, qkv, True),
    "convolution": (lambda m, x: m.c(x.reshape(-1, 4, 4, 4)),
                    lambda: {"c": nn.Conv2d(4, 6, 3, stride=2, padding=1)}, True),
    "convolutions": (lambda m, x: m.d(torch.tanh(m.c(x.mT))),
                     lambda: {"c": nn.Conv1d(8, 6, 3, padding=1),
                              "d": nn.Conv1d(6, 4, 2, bias=False)}, True),
    "one image": (lambda m, x: torch.stack([m.c(r.mT) for r in x]),
                  lambda: {"c": nn.Conv1d(8, 6, 3)}, False),
    "padding by name": (lambda m, x: m.c(x.mT),
                        lambda: {"c": nn.Conv1d(8, 6, 3, padding="same")}, False),
    "groups": (lambda m, x: m.c(x.reshape(-1, 4, 4, 4)),
               lambda: {"c": nn.Conv2d(4, 8, 3, groups=2)}, False),
    "einsum": (lambda m, x: torch.einsum("bnk,ck->bnc", x, m.weight), weight, False),
    "matmul": (lambda m, x: x @ m.weight.mT + F.linear(x, m.weight), weight, False),
    "normed": (lambda m, x: F.linear(x, F.normalize(m.weight, dim=1)), weight, False),
    "columns": (lambda m, x: F.linear(x[..., :4], m.weight[:, :4]), weight, False),
    "in a list": (lambda m, x: F.linear(x, torch.cat([m.weight, m.weight])), weight, False),
    "attention": (own_attention,
                  lambda: {"attention": nn.MultiheadAttention(8, 2, batch_first=True)}, False),
    "not seen": (lambda m, x: F.linear(x, Twice.apply(m.weight)), weight, False),
}  # fmt: skip


def use(name: str) -> tuple[nn.Module, bool]:
    torch.manual_seed(3)
    call, parts, whole = USES[name]
    return Computes(call, **parts()).double(), whole
