"""The oracle: PyTorch's own formula in float64, and how much rounding is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def rounding_as_it_goes() -> Iterator[None]:
    """MATH keeps 16-bit operands and intermediates in their dtype, not in float32.

    The eager formula in the same dtype: what a gradient in 16 bits is compared with. Every fused
    backward starts from an output that was rounded to 16 bits; MATH in float32 does not.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def where_finite(found, otherwise):
    """``found``, with tensors that overflowed replaced by those of ``otherwise``."""
    return tree_map(lambda a, b: a if a.isfinite().all() else b, found, otherwise)


def double(value):
    """Every floating-point tensor in a nested value, in float64."""
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value
    )


@contextmanager
def poison() -> Iterator[None]:
    """Fills uninitialized memory, as ``torch.empty`` returns it, with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2, 3).new_empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def of_some(function: Callable[..., Any], operands: Sequence[Any], moving: Sequence[int]):
    """The function of the operands with indices ``moving``; the others are held."""

    def of(*some):
        every = list(operands)
        for i, x in zip(moving, some, strict=True):
            every[i] = x
        return function(*every)

    return of


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


def attention_derivatives(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    grad: Tensor,
    grad_t: Tensor,
    **options,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Attention, R tangents of it, and the gradients of both together, by autograd of jvp.

    Args:
        primals: query, key, value and mask (or None).
        tangents: (R, ...) of each, or None for zero.
        grad: cotangent of the output.
        grad_t: (R, ...), cotangents of its tangents.
        **options: of attention.

    Returns:
        Output, its tangents, gradients of the floating-point primals and of the tangents given.
    """
    leaves: list[Any] = [
        x.detach().contiguous().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in primals
    ]
    moving = [i for i, x in enumerate(leaves) if x is not None and x.requires_grad]
    copies = (None if t is None else t.detach().clone().requires_grad_() for t in tangents)
    given: list[Any] = list(copies)

    op = of_some(functools.partial(math_attention, **options), leaves, moving)
    pairs = []
    for r in range(len(grad_t)):
        along = [torch.zeros_like(leaves[i]) if given[i] is None else given[i][r] for i in moving]
        pairs.append(torch.func.jvp(op, tuple(leaves[i] for i in moving), tuple(along)))
    output, output_t = pairs[0][0], torch.stack([pair[1] for pair in pairs])
    loss = (output * grad).sum() + (output_t * grad_t).sum()
    wanted = [leaves[i] for i in moving], [t for t in given if t is not None]
    grads = torch.autograd.grad(loss, [*wanted[0], *wanted[1]])
    split = len(wanted[0])
    return output.detach(), output_t.detach(), list(grads[:split]), list(grads[split:])


def error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖, over all elements."""
    assert found.shape == exact.shape
    return float((found.detach().double() - exact.detach().double()).norm())


def assert_as_good_as(found, exact, eager, scores: float = 0.0, terms: float = 0.0) -> None:
    """Each tensor errs at most twice as much as eager PyTorch in the same dtype, plus rounding.

    The rounding allowed is one of the result in its own dtype, and a few of intermediates of
    size 1 in float32, or one of `terms`: an exact 0 may come out as the difference of two such.

    Args:
        found: nested tensors under test.
        exact: the same in float64.
        eager: the same by eager PyTorch in the dtype of ``found``.
        scores: the largest |S|. Whatever the order of computation, such scores in float32 err by
            eps times themselves and weights as much relatively; eager PyTorch's own error here
            depends on the processor. So twice that is allowed, relative to the result.
        terms: the size of intermediates that cancel in an entry of the result.
    """
    cancelled = max(1e-6, torch.finfo(torch.float32).eps * terms)
    conditioning = 2 * torch.finfo(torch.float32).eps * scores
    leaves = [tree_leaves(value) for value in (found, exact, eager)]
    assert leaves[0]
    for one, right, other in zip(*leaves, strict=True):
        rounding = (
            torch.finfo(one.dtype).eps * float(right.detach().norm())
            + cancelled * right.numel() ** 0.5
        )
        rounding += conditioning * float(right.detach().norm())
        assert error(one, right) <= 2 * error(other, right) + rounding  # a NaN fails, too
