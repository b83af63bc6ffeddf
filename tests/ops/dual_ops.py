"""Every operation that is computed on dual tensors, one row each.

A new operation is a new row: test_dual_ops.py runs its whole contract on each, by every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops import functional as ops
from tests.ops import oracle

Shape = tuple[int, ...]
Shapes = Callable[[Shape, int], list[Shape]]
BOTH = ("reference", "triton")


class Op(NamedTuple):
    """One operation.

    Attributes:
        ours: (*operands, backend=...) -> the output.
        pytorchs: the same by PyTorch's own function: what rounding is compared with.
        shapes: of the operands, by leading dimensions and width.
        words: the same in elementary operations, whose derivatives of every order are right; None
            where PyTorch's own are.
        backends: that compute it.
        fused: those whose formulas run; the others leave it to PyTorch's rules.
    """

    ours: Callable[..., Any]
    pytorchs: Callable[..., Any]
    shapes: Shapes
    words: Callable[..., Any] | None = None
    backends: tuple[str, ...] = BOTH
    fused: tuple[str, ...] = BOTH

    @property
    def exact(self) -> Callable[..., Any]:
        return self.words or self.pytorchs

    def draw(self, lead=(2, 5), width=24, seed=0, **kind) -> tuple[list[Tensor], list[Tensor]]:
        """Primals and as many tangents."""
        source = torch.Generator().manual_seed(seed)
        every = [
            torch.randn(shape, generator=source, dtype=torch.float64).to(**kind)
            for shape in 2 * self.shapes(lead, width)
        ]
        return every[: len(every) // 2], every[len(every) // 2 :]


def norm(x, weight=None, bias=None, *, dims=1, centered=True, eps=1e-5):
    over = tuple(range(-dims, 0))
    x = x - x.mean(over, keepdim=True) if centered else x
    x = x * (x.square().mean(over, keepdim=True) + eps).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def operands(count: int, lines: int, *inner: int) -> Shapes:
    """Shapes of ``count`` whole operands (*lead, *inner, width), and ``lines`` (*inner, width)."""

    def shapes(lead, width):
        return [(*lead, *inner, width)] * count + [(*inner, width)] * lines

    return shapes


def layer_norm(shapes: Shapes, dims: int = 1, **options: Any) -> Op:
    def ours(x, weight=None, bias=None, backend=None):
        return ops.layer_norm(x, x.shape[-dims:], weight, bias, backend=backend)

    def pytorchs(x, weight=None, bias=None):
        return F.layer_norm(x, x.shape[-dims:], weight, bias)

    return Op(ours, pytorchs, shapes, functools.partial(norm, dims=dims), **options)


def of_bias(function):
    """The function of x and bias, without a weight."""
    return lambda x, bias, **options: function(x, None, bias, **options)


def rms_norm(shapes: Shapes, dims: int = 1, **options: Any) -> Op:
    def ours(x, weight=None, backend=None):
        return ops.rms_norm(x, x.shape[-dims:], weight, 1e-6, backend=backend)

    def pytorchs(x, weight=None):
        return F.rms_norm(x, x.shape[-dims:], weight, 1e-6)

    words = functools.partial(norm, dims=dims, centered=False, eps=1e-6)
    return Op(ours, pytorchs, shapes, words, **options)


def softmax(dim: int, **options: Any) -> Op:
    def words(x):
        powers = (x - x.detach().amax(dim, keepdim=True)).exp() if x.numel() else x.exp()
        return powers / powers.sum(dim, keepdim=True)

    return Op(
        lambda x, backend=None: ops.softmax(x, dim, backend=backend),
        lambda x: torch.softmax(x, dim),
        operands(1, 0),
        words,
        **options,
    )


def convolution(function, input: Shape, weight: Shape, fused=("reference",), **options) -> Op:
    """A convolution of fixed shapes; ``options`` are PyTorch's."""
    return Op(
        lambda *a, backend=None: ops.convolution(function, *a, **options),
        functools.partial(function, **options),
        lambda lead, width: [input, weight, weight[:1]],
        backends=("reference",),
        fused=fused,
    )


def attention(shapes: Shapes, mask: bool = False, **options: Any) -> Op:
    """Attention; with ``mask`` under a boolean mask that leaves every query a key."""

    def keys(query, key):
        if not mask:
            return {}
        # Nothing in place: torch.func.linearize would lose it.
        score = torch.arange(query.shape[-2] * key.shape[-2], device=query.device)
        allowed = (score % 3 > 0) | (score % key.shape[-2] == 0)
        return {"attn_mask": allowed.reshape(query.shape[-2], -1)}

    def ours(q, k, *rest, backend=None):
        call = functools.partial(ops.scaled_dot_product_attention, backend=backend, **options)
        return call(q, k, *rest, **keys(q, k))

    def pytorchs(q, k, *rest):
        return oracle.math_attention(q, k, *rest, **options, **keys(q, k))

    def words(q, k, v, bias=None):
        groups = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
        scores = (q @ k.mT) * options.get("scale", q.shape[-1] ** -0.5)
        scores = scores if bias is None else scores + bias
        powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        if options.get("is_causal"):
            powers = powers.tril()
        powers = powers * keys(q, k).get("attn_mask", 1.0)
        return powers / powers.sum(-1, keepdim=True) @ v

    return Op(ours, pytorchs, shapes, words, fused=())


def heads(query: int, key: int, bias: bool = False) -> Shapes:
    """Shapes of query, key, value (and a bias shared by the batch); head_dim a multiple of 8."""

    def shapes(lead, width):
        tokens, dim = (1, *lead)[-1], 8 * -(-width // 24)
        first = [(1, query, tokens, dim), (1, key, tokens + 1, dim), (1, key, tokens + 1, dim + 8)]
        return first + [(1, query, tokens, tokens + 1)] * bias

    return shapes


PATCHES = F.conv2d, (2, 3, 8, 8), (5, 3, 4, 4)
OPS: dict[str, Op] = {
    "layer_norm": layer_norm(operands(1, 2)),
    "layer_norm, no affine": layer_norm(operands(1, 0)),
    "layer_norm, weight alone": layer_norm(operands(1, 1)),
    "layer_norm, two dimensions": layer_norm(operands(1, 2, 3), dims=2),
    "rms_norm": rms_norm(operands(1, 1)),
    "rms_norm, no weight": rms_norm(operands(1, 0)),
    "rms_norm, two dimensions": rms_norm(operands(1, 1, 3), dims=2, fused=("triton",)),
    "gelu": Op(ops.gelu, F.gelu, operands(1, 0)),
    "gelu, tanh": Op(
        functools.partial(ops.gelu, approximate="tanh"),
        functools.partial(F.gelu, approximate="tanh"),
        operands(1, 0),
    ),
    "silu": Op(ops.silu, F.silu, operands(1, 0)),
    "softmax": softmax(-1),
    "softmax, first dimension": softmax(0, backends=("reference",)),
    "linear": Op(ops.linear, F.linear, lambda lead, width: [(*lead, width), (37, width), (37,)]),
    "linear, no bias": Op(
        ops.linear, F.linear, lambda lead, width: [(*lead, width), (37, width)]
    ),
    "convolution, patches": convolution(*PATCHES, stride=4),
    "convolution, padded": convolution(
        F.conv2d, (2, 4, 7, 6), (6, 4, 3, 3), padding=(1, 2), stride=(2, 1)
    ),
    "convolution, depthwise": convolution(
        F.conv2d, (2, 4, 7, 7), (4, 1, 3, 3), padding=1, groups=4
    ),
    "convolution, dilated": convolution(F.conv2d, (1, 2, 9, 9), (3, 2, 3, 3), dilation=2),
    "convolution, same": convolution(F.conv2d, (1, 2, 6, 6), (3, 2, 3, 3), (), padding="same"),
    "convolution, unbatched": convolution(F.conv2d, (2, 6, 6), (3, 2, 3, 3), ()),
    "convolution, 1d": convolution(F.conv1d, (2, 3, 9), (4, 3, 3), stride=(2,)),
    "convolution, 3d": convolution(F.conv3d, (1, 2, 4, 5, 6), (3, 2, 2, 2, 2), stride=2),
}  # fmt: skip
_BIAS_ALONE = layer_norm(operands(1, 1), fused=("triton",))
OPS["layer_norm, bias alone"] = _BIAS_ALONE._replace(
    ours=of_bias(_BIAS_ALONE.ours),
    pytorchs=of_bias(_BIAS_ALONE.pytorchs),
    words=of_bias(_BIAS_ALONE.words),
)
# Tests of attention itself cover its shapes, strides and dtypes.
ATTENTION: dict[str, Op] = {
    "attention": attention(heads(2, 2), scale=-0.3),
    "attention, causal": attention(heads(2, 2), is_causal=True),
    "attention, boolean mask": attention(heads(2, 2), mask=True),
    "attention, bias": attention(heads(2, 2, bias=True)),
    "attention, grouped heads": attention(heads(4, 2), enable_gqa=True),
}
