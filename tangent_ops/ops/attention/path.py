"""Decides which code computes an attention call."""

from __future__ import annotations

import enum

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from tangent_ops.ops.attention.eager import batch_and_heads_agree
from tangent_ops.ops.backend import (
    Backend,
    choose_backend,
    in_plain_dual_level,
    is_traced,
    may_be_dual,
    reverse_mode_reaches,
    tangents_are_hidden,
)
from tangent_ops.ops.levels import is_compiling

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(8, 257, 8)


class Path(enum.Enum):
    """The code that computes a call."""

    PYTORCH = "PyTorch's own function"
    KERNELS = "Triton kernels, value and tangent from unpacked operands"
    KERNELS_RULE = "Triton kernels for the value; their autograd.Function carries the tangents"
    FORMULA = "the eager formula of the value; PyTorch's rules carry the tangents"
    BLOCKS = "eager formulas of value and tangent, a block of scores at a time"
    PAIR = "eager formulas of value and tangent"


def decide(operands: tuple[Tensor, ...], dropout_p: float, backend: Backend | None) -> Path:
    """Decide which code computes an attention call, by the first row that fits.

    ======== ==================================================== ============
    backend  where and with what                                  path
    ======== ==================================================== ============
    None     no operand has a tangent                             PYTORCH
    triton   in compiled code                                     KERNELS
    triton   tangents hidden: vmap or grad within forward mode    KERNELS_RULE
    triton   in a dual_level, a dual and a tracked operand        KERNELS_RULE
    triton   anything else, also without tangents                 KERNELS
    formulas no tangents, or hidden ones; in compiled code        FORMULA
    formulas reverse mode tracks an operand at some level         FORMULA
    formulas in a dual_level alone, not traced by make_fx, no     BLOCKS
             mask, no dropout, q, k and v of equal (B, H)
    formulas anything else: masks, dropout, torch.func.jvp        PAIR
    ======== ==================================================== ============

    The backend is "triton" by name, or by default for CUDA tensors of float16, bfloat16 or float32
    whose head dimensions are multiples of 8 up to 256, except in compiled forward mode over forward
    mode. It is "formulas" (the reference backend) by name and in all other cases.

    Args:
        operands: query, key, value and perhaps a mask, checked and cast, plain or dual.
        dropout_p: the call's dropout probability.
        backend: the caller's choice.

    Raises:
        ArgumentError: an unknown backend.
        UnsupportedError: ``backend="triton"``, and the kernels do not compute this call; or the
            tensors are on CUDA and Triton is not installed.
    """
    dual = any(may_be_dual(operand) for operand in operands)
    if backend is None and not dual:
        return Path.PYTORCH
    query, key, value, *mask = operands
    if choose_backend(backend, query, why_not_fused(query, value)) == "triton":
        if is_compiling():
            return Path.KERNELS
        # In a dual level the gradient of a tracked primal has a tangent of its own.
        tracked = dual and in_plain_dual_level() and any(x.requires_grad for x in operands)
        return Path.KERNELS_RULE if tracked or tangents_are_hidden() else Path.KERNELS
    if not dual or tangents_are_hidden() or is_compiling() or reverse_mode_reaches(*operands):
        return Path.FORMULA
    plain = not mask and not dropout_p and not is_traced() and in_plain_dual_level()
    return Path.BLOCKS if plain and batch_and_heads_agree(query, key, value) else Path.PAIR


def why_not_fused(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot compute this call, for an error message; None if they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not one of float16, bfloat16, float32"
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] not in HEAD_DIMS:
            return f"{name}'s head_dim {tensor.shape[-1]} is not a multiple of 8 from 8 to 256"
    if is_compiling() and eager_transforms.JVP_NESTING > 1:
        return "compiled forward mode over forward mode is not in the kernels"
    return None
