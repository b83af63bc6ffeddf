"""Sample calls of the norm, activation, softmax and linear kernels, as launches not yet run."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable

import torch
from tangent_kernels import activation, layer_norm, linear, softmax
from tangent_kernels._launch import Launch

ROWS = 400  # tokens of a batch of two images
WIDTHS = (384, 768, 1024, 3072, 4096)  # of ViT-S, B, L, the hidden layer of B, the widest


def launches(
    width: int, dtype: torch.dtype, count: int = ROWS, device: str = "cpu"
) -> dict[str, Launch]:
    """Name -> launch of the kernel with all its operands, on ``count`` rows of ``width``."""

    def filled(*shape: int) -> torch.Tensor:  # sums over a row stay in float16's range
        return torch.full(shape, 0.125, dtype=dtype, device=device)

    def rows() -> torch.Tensor:
        return filled(count, width)

    def line() -> torch.Tensor:
        return filled(width)

    def statistic() -> torch.Tensor:
        return torch.ones(count, device=device)

    forward = [rows(), line(), line(), rows(), line(), line()]
    needs = (True, True, True)
    normalized = (rows(), line(), statistic(), statistic())
    none = (None, None, None)
    plans: dict[str, Callable] = {
        "layer norm": lambda: layer_norm.plan_jvp(*forward, 1e-6, True),
        "layer norm, first order": lambda: layer_norm.plan_backward(
            *normalized, *none, rows(), False, False, False, *needs
        ),
        "layer norm, second order": lambda: layer_norm.plan_backward(
            *normalized, rows(), line(), rows(), rows(), *needs, *needs
        ),
        "softmax": lambda: softmax.plan_jvp(rows(), rows()),
        "softmax, second order": lambda: softmax.plan_backward(
            rows(), rows(), rows(), rows(), True, True
        ),
        "linear": lambda: linear.plan_jvp(
            rows(),
            filled(width, width),
            line(),
            rows(),
            filled(width, width),
            line(),
        ),
    }
    for name in activation.ACTIVATIONS:
        plans[name] = lambda name=name: activation.plan_jvp(rows(), rows(), name)
        plans[f"{name}, second order"] = lambda name=name: activation.plan_backward(
            rows(), rows(), rows(), rows(), True, True, name
        )
    return {name: plan()[-1][0] for name, plan in plans.items()}
