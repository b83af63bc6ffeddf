"""The affine map for plain and dual tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import UnpackedDualTensor

from tangent_ops.functional._backend import in_plain_dual_level, may_be_dual
from tangent_ops.reference.linear import linear_jvp


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose tangent takes fewer passes over memory.

        y = x Wᵀ + b        y_t = x_t Wᵀ + x W_tᵀ + b_t

    Inside ``torch.func`` transforms and compiled code, and while gradients are recorded, it is
    PyTorch's: there its own rules nest, the compiler fuses, or nothing was gained (measured).

    Args:
        input: (..., K), plain or dual.
        weight: (C, K), plain or dual.
        bias: (C,), plain or dual, or None.

    Returns:
        (..., C), dual if an input is.
    """
    operands = (input, weight, bias)
    if (
        torch.is_grad_enabled()
        or not in_plain_dual_level()
        or not any(may_be_dual(operand) for operand in operands)
    ):
        return F.linear(input, weight, bias)
    absent = UnpackedDualTensor(None, None)  # pyright: ignore[reportArgumentType]
    pairs = (absent if x is None else forward_ad.unpack_dual(x) for x in operands)
    primals, tangents = zip(*pairs, strict=True)
    return forward_ad.make_dual(*linear_jvp(*primals, *tangents))
