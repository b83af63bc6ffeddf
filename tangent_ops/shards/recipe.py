"""`Recipe`: how each shard is trained. With the anchor and the samples it determines a delta."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearize import last_blocks
from tangent_ops.training.fit import OPTIMIZERS, SCHEDULES

LOSSES = {"rsl": RescaledSquareLoss, "cross-entropy": nn.CrossEntropyLoss}
METHODS = ("gradient", "exact")


@dataclass(frozen=True)
class Recipe:
    """The options of a shard's training; plain values, which are written into the plan.

    Attributes:
        blocks: train the last so many blocks, norm and head; None for every parameter.
        rank: of low-rank deltas, as in `linearize`; None for full ones.
        basis: seed of their fixed factors.
        method: "gradient", by `fit`; or "exact", by `fit_exact`, which needs l2 > 0.
        loss: "rsl", the rescaled square loss, which is quadratic; or "cross-entropy".
        epochs, lr, batch_size, optimizer, schedule, l2, accumulate: as in `fit`.
        tol: of "exact", as in `fit_exact`.
        augment: timm's training transforms in place of those for inference. They are drawn anew in
            every epoch, so nothing is cached.
        seed: of everything that is drawn, but for what privacy needs to stay secret.
        grad_checkpointing: blocks run again in the backward pass, for memory.
        amp: bfloat16 autocast.
        threads: of a shard's process. Sums are split by them, so they are part of the recipe.
        cache: run the frozen blocks below the first trained one once a sample.
        dp_epsilon: ε of a private fit by `fit_private`; None for none. Then lr, l2, optimizer and
            schedule are its; epochs and batch_size are not used.
        dp_delta: its δ, below one over the number of samples in the largest shard.
        dp_clip: its max_grad_norm.
        dp_batch_size: its expected_batch_size; a smaller shard takes all its samples in each step.
        dp_steps: its steps.

    Raises:
        ArgumentError: a value out of range, or two that exclude each other.
    """

    blocks: int | None = 1
    rank: int | None = None
    basis: int = 0
    method: str = "gradient"
    loss: str = "rsl"
    epochs: int = 15
    lr: float = 1e-4
    batch_size: int = 32
    optimizer: str = "adamw"
    schedule: str = "cosine"
    l2: float = 0.0
    accumulate: int = 1
    tol: float = 1e-3
    augment: bool = False
    seed: int = 0
    grad_checkpointing: bool = False
    amp: bool = False
    threads: int = 1
    cache: bool = True
    dp_epsilon: float | None = None
    dp_delta: float | None = None
    dp_clip: float = 1.0
    dp_batch_size: float = 256.0
    dp_steps: int = 100

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, str(field.type))
        for name in ("epochs", "batch_size", "accumulate", "threads", "dp_steps"):
            check_integer(name, getattr(self, name), 1)
        for name in ("basis", "seed"):
            check_integer(name, getattr(self, name), 0)
        if self.blocks is not None:
            check_integer("blocks", self.blocks, 0)
        if self.rank is not None:
            check_integer("rank", self.rank, 1)
        for name in ("lr", "dp_clip", "dp_batch_size"):
            self._check_positive(name)
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ArgumentError(f"l2 must be finite and not negative, got {self.l2}")
        if not 0 < self.tol < 1:
            raise ArgumentError(f"tol must be between 0 and 1, got {self.tol}")
        self._check_choice("loss", LOSSES)
        self._check_choice("method", METHODS)
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_choice("schedule", SCHEDULES)
        if self.method == "exact":
            self._check_exact()
        if self.dp_epsilon is not None:
            self._check_private()
        elif self.dp_delta is not None:
            raise ArgumentError("dp_delta is for a private fit: give dp_epsilon, too")

    @property
    def cached(self) -> bool:
        """Whether the frozen blocks run once a sample."""
        return self.cache and not self.augment and self.blocks is not None

    def trainable(self, model: nn.Module) -> str | None:
        """The pattern of the trained parameters, for `linearize`."""
        return None if self.blocks is None else last_blocks(model, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Names and plain values, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """What `to_dict` gave.

        Raises:
            ArgumentError: an unknown name, or as in `Recipe`.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f": did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
                raise ArgumentError(f"a recipe has no {name!r}{hint}")
        return cls(**values)

    def _check_type(self, name: str, annotation: str) -> None:
        value = getattr(self, name)
        if value is None and annotation.endswith("None"):
            return
        kind = annotation.split(" ")[0]
        fits = {
            "int": type(value) is int,
            "float": type(value) in (int, float),
            "bool": type(value) is bool,
            "str": type(value) is str,
        }
        if not fits[kind]:
            names = {"int": "an integer", "float": "a number", "bool": "true or false"}
            raise ArgumentError(f"{name} must be {names.get(kind, 'a string')}, got {value!r}")
        if kind == "float" and type(value) is int:  # 1 and 1.0 are one recipe
            object.__setattr__(self, name, float(value))

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value > 0):
            raise ArgumentError(f"{name} must be positive and finite, got {value}")

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ArgumentError(f"{name} must be one of {[*choices]}, got {value!r}")

    def _check_exact(self) -> None:
        if self.l2 <= 0:
            raise ArgumentError(f"method 'exact' needs l2 > 0, got {self.l2}: try l2=1e-3")
        for name in ("augment", "amp"):
            if getattr(self, name):
                raise ArgumentError(f"{name} is for method 'gradient': it has no one optimum")
        if self.dp_epsilon is not None:
            raise ArgumentError("dp_epsilon is for method 'gradient': fit_private is DP-SGD")

    def _check_private(self) -> None:
        self._check_positive("dp_epsilon")
        if self.dp_delta is None or not 0 < self.dp_delta < 1:
            raise ArgumentError(
                f"dp_epsilon needs dp_delta between 0 and 1, got {self.dp_delta}: take less than "
                "one over the number of samples in the largest shard, 1e-5 say"
            )
        for name in ("augment", "amp"):
            if getattr(self, name):
                raise ArgumentError(f"{name} is not for private fits: leave it out")
        if self.accumulate != 1:
            raise ArgumentError(
                "accumulate is not for private fits: their batches are drawn at random, and go "
                "through in parts anyway"
            )
