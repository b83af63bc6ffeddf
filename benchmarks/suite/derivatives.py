"""What the rivals of several workloads share: finite differences, dual numbers, when to compile."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.suite.case import Case
from tangent_ops import fused_forward_ad

COMPILE_ON_CPU = "TANGENT_OPS_BENCH_COMPILE"  # environment variable


def finite_difference_step(dtype: torch.dtype) -> float:
    """The h of (f(p + h t) - f(p)) / h: √eps, rounded up to a power of two.

    The difference rounds at eps |f| / h and its curvature adds h |f''|: both are then √eps where
    p, t and the derivatives are of one size. A power of two multiplies and divides exactly.
    float32: 2^-11; float16: 2^-5; bfloat16: 2^-3.
    """
    return 2.0 ** math.ceil(math.log2(torch.finfo(dtype).eps) / 2)


def finite_difference_slack(bound: float) -> float:
    """How many times an exact method's bound finite differences may err: 1e4, or up to 10 %.

    They keep half the digits. In bfloat16 that is one digit, and they may well be found wrong.
    """
    return min(1e4, 0.1 / bound)


def push_forward(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Output and tangent of ``function(*primals)`` in a plain dual level, heavy ops fused.

    As ``LinearizedModel`` runs its anchor.
    """
    with fused_forward_ad(), forward_ad.dual_level():
        output = function(*map(forward_ad.make_dual, primals, tangents))
        primal, tangent = forward_ad.unpack_dual(output)
    assert tangent is not None
    return primal, tangent


def compiling_is_too_slow(case: Case, device: torch.device) -> str | None:
    """Why a compiled provider is absent here, or None."""
    if device.type != "cpu" or os.environ.get(COMPILE_ON_CPU) == "1":
        return None
    return f"on the CPU only with {COMPILE_ON_CPU}=1: compiling takes a minute a case"
