"""The independent answer: PyTorch's own formula in float64, and how far rounding may stray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map


def math_attention(*args, **kwargs) -> Tensor:
    """PyTorch's attention by the one backend that has a forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def double(value):
    """Every floating-point tensor in a nested value, in float64."""
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value
    )


def pushforward(op: Callable[..., Tensor], primals, tangents) -> tuple[Any, Any]:
    """Output and tangent of op(*primals) in a plain dual level; a tangent of None is absent."""
    with forward_ad.dual_level():
        dual = [
            p if t is None else forward_ad.make_dual(p, t)
            for p, t in zip(primals, tangents, strict=True)
        ]
        output, output_t = forward_ad.unpack_dual(op(*dual))
        return output, output_t


def attention_jvp(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], **options
) -> tuple[Tensor, Tensor]:
    """Output and tangent of attention by torch.func.jvp; a tangent of None is zero."""
    primals = [p.contiguous() for p in primals]  # PyTorch makes no expanded tensor dual
    filled = [
        torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)
    ]
    return torch.func.jvp(lambda *a: math_attention(*a, **options), tuple(primals), tuple(filled))


def attention_vjp(primals: Sequence[Tensor], cotangent: Tensor, **options) -> tuple[Tensor, ...]:
    """Gradients of query, key and value by torch.func.vjp."""
    _, pull_back = torch.func.vjp(lambda *a: math_attention(*a, **options), *primals)
    return pull_back(cotangent)


def error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖, over all elements."""
    assert found.shape == exact.shape
    return float((found.detach().double() - exact.detach().double()).norm())


def assert_as_good_as(found, exact, eager) -> None:
    """Each tensor errs at most twice as much as eager PyTorch in the same dtype, plus rounding.

    The rounding allowed is one of the result in its own dtype, and a few of intermediates of
    size 1 in float32: an exact 0 may come out as the difference of two such.

    Args:
        found: nested tensors under test.
        exact: the same in float64.
        eager: the same by eager PyTorch in the dtype of ``found``.
    """
    leaves = [tree_leaves(value) for value in (found, exact, eager)]
    assert leaves[0]
    for one, right, other in zip(*leaves, strict=True):
        rounding = (
            torch.finfo(one.dtype).eps * float(right.detach().norm()) + 1e-6 * right.numel() ** 0.5
        )
        assert error(one, right) <= 2 * error(other, right) + rounding  # a NaN fails, too
