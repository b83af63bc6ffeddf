"""Operations whose tangents PyTorch cannot differentiate, or gets wrong: the same maps in words.

Values are PyTorch's, bit for bit. Derivatives are those of the words, of every order, computed in
float32 at least and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from tangent_ops.ops.levels import is_compiling
from tangent_ops.ops.pytorch_rules import are_nested, out_of_place


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``; in PyTorch its tangent has no derivative."""

    def words() -> Tensor:
        wide = _wide(input.clone() if inplace else input)
        sloping = (wide > -3.0) & (wide < 3.0)
        return torch.where(sloping, wide / 6.0 + 0.5, F.hardsigmoid(wide.detach()))

    output = with_value_of(F.hardsigmoid, words, input)
    return input.copy_(output) if inplace else output


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``F.glu``; in PyTorch its tangent has no derivative."""

    def words() -> Tensor:
        half = input.shape[dim] // 2
        first, gate = (_wide(input.narrow(dim, start, half)) for start in (0, half))
        return first * gate.sigmoid()

    return with_value_of(F.glu, words, input, dim)


def normalize(
    input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """``F.normalize``; in PyTorch derivatives of its tangent are NaN at zeros (padding)."""
    if not 1.0 < p < math.inf or out is not None or input.is_complex():
        return out_of_place(F.normalize, input, p, dim, eps, out)

    def words() -> Tensor:
        wide = _wide(input)
        total = (wide.square() if p == 2.0 else wide.abs().pow(p)).sum(dim, keepdim=True)
        nothing = total == 0  # where the root has no slope
        root = total.masked_fill(nothing, 1.0)
        norm = (root.sqrt() if p == 2.0 else root.pow(1 / p)).masked_fill(nothing, 0.0)
        return wide / norm.clamp_min(eps)

    return with_value_of(F.normalize, words, input, p, dim, eps)


def with_value_of(
    function: Callable[..., Any], words: Callable[[], Tensor], *args: Any, **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)``, or the first of its results, with derivatives of ``words``.

    Args:
        function: PyTorch's own, which comes first: it raises for bad input, and may change running
            statistics in place.
        words: makes its first result in the same dtype or a wider one.
        *args: of ``function``, plain or dual.
        **kwargs: of ``function``.
    """
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    found = function(*args, **kwargs)
    value, *rest = found if isinstance(found, tuple) else (found,)
    same = words().to(value.dtype)
    # Dynamo does not trace a Function with a jvp; nested, functorch's own are not always right.
    output = same if is_compiling() or are_nested() else _ValueOf.apply(value, same)
    return (output, *rest) if isinstance(found, tuple) else output


class _ValueOf(torch.autograd.Function):
    """The value of one tensor with the derivatives of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, words: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, value_t: Tensor | None, words_t: Tensor) -> Tensor:
        return words_t.clone()  # what a model changes in place is its own


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
