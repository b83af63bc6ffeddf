"""What `fit` can be told: its checked options, optimizers and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError

Loss = Callable[[Tensor, Tensor], Tensor]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}

# Factor of the learning rate after this fraction of all steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4)),
}


@dataclass(frozen=True)
class Options:
    """The checked options of `fit`."""

    loss: Loss | None
    epochs: int
    lr: float
    optimizer: str
    l2: float
    schedule: str
    seed: int
    amp: bool | None
    progress: bool
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 1)
        check_integer("seed", self.seed, 0)
        check_integer("accumulate", self.accumulate, 1)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError(f"lr must be positive and finite, got {self.lr}")
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ArgumentError(f"l2 must be finite and not negative, got {self.l2}")
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(f"optimizer must be one of {[*OPTIMIZERS]}, got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ArgumentError(f"schedule must be one of {[*SCHEDULES]}, got {self.schedule!r}")

    def precision(self, device: torch.device) -> torch.dtype | None:
        """Autocast's dtype; None for no autocast."""
        if self.amp is None and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)  # the caller's own
        by_default = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if (by_default if self.amp is None else self.amp) else None

    def autocast(self, device: torch.device) -> torch.autocast:
        dtype = self.precision(device)
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
