"""`Recipe`: the options of a training, with their defaults and ranges; it needs no torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from tangent_ops.checks import (
    check_choice,
    check_integer,
    check_not_negative,
    check_positive,
    did_you_mean,
)
from tangent_ops.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tangent_ops.losses import Loss

    MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
else:
    Loss = Callable  # the command line reads the fields' types

LOSSES = ("rsl", "cross-entropy")


def _adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(parameters, lr=lr, weight_decay=0.0)


def _momentum(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    from torch.optim import SGD

    return SGD(parameters, lr=lr, momentum=0.9)


OPTIMIZERS: dict[str, MakeOptimizer] = {"adamw": _adamw, "sgd": _momentum, "momentum": _momentum}

# Factor of the learning rate after this fraction of all steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4)),
}


class RecipeOptions(TypedDict, total=False):
    """The fields of a `Recipe` as keywords, for editors and type checkers."""

    loss: Loss | str | None
    epochs: int
    lr: float
    optimizer: str
    l2: float
    schedule: str
    batch_size: int
    seed: int
    amp: bool | None
    accumulate: int


@dataclass(frozen=True)
class Recipe:
    """How to train: options of `fit`, `fit_head`, `fit_grouped`, `fit_private` and plans of shards.

    Each of these functions takes a recipe, or its fields as keywords, or both; then the keywords
    replace the recipe's fields.

    Attributes:
        loss: (logits, targets) -> scalar mean over the batch; or "rsl", the default, for
            `RescaledSquareLoss()`, or "cross-entropy". None is "rsl". Logits of 16-bit models are
            passed in float32.
        epochs: passes over the data.
        lr: learning rate at the start.
        optimizer: "adamw" (weight decay 0), "sgd" or "momentum" (both SGD with momentum 0.9; in
            `fit_private` "sgd" has no momentum).
        l2: weight of the squared norm; its gradient l2 * p is added to the loss's.
        schedule: of the learning rate, per step: "cosine" to 0, "step" (times 0.1 after 1/2 and
            again after 3/4 of the steps) or "constant".
        batch_size: of a Dataset; a DataLoader has its own.
        seed: of the order of the samples, dropout and random augmentation.
        amp: bfloat16 autocast; None: on CUDA devices that have it, or as the caller's own
            ``with torch.autocast(...)`` says.
        accumulate: number of parts, as equal as possible, that a batch is run in to save memory;
            there is one step per batch. With a loss that is a mean over samples, the step is that
            of the whole batch except for the order of sums; a loss that compares the samples of a
            batch sees only those of a part.

    Raises:
        ArgumentError: a value out of range.
    """

    loss: Loss | str | None = "rsl"
    epochs: int = 15
    lr: float = 1e-4
    optimizer: str = "adamw"
    l2: float = 0.0
    schedule: str = "cosine"
    batch_size: int = 32
    seed: int = 0
    amp: bool | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.loss is None:
            object.__setattr__(self, "loss", "rsl")  # one form, so that equal recipes are equal
        if not callable(self.loss):
            check_choice("loss", self.loss, LOSSES, " or a function of logits and targets")
        for name in ("epochs", "batch_size", "accumulate"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        check_positive(lr=self.lr)
        check_not_negative(l2=self.l2)
        if not (self.amp is None or isinstance(self.amp, bool)):
            raise ArgumentError(f"amp must be True, False or None, got {self.amp!r}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)

    @property
    def loss_function(self) -> Loss:
        """The loss as a function of logits and targets."""
        if callable(self.loss):
            return self.loss
        from torch.nn import CrossEntropyLoss

        from tangent_ops.losses import RescaledSquareLoss

        return CrossEntropyLoss() if self.loss == "cross-entropy" else RescaledSquareLoss()

    def lr_at(self, done: float) -> float:
        """The learning rate after this fraction of all steps."""
        return self.lr * SCHEDULES[self.schedule](done)

    def precision(self, device: torch.device) -> torch.dtype | None:
        """Autocast's dtype; None for no autocast."""
        import torch

        if self.amp is None and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)  # the caller's own
        by_default = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if (by_default if self.amp is None else self.amp) else None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that a model's forward pass runs in."""
        import torch

        dtype = self.precision(device)
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def recipe_of(
    function: Callable[..., Any],
    recipe: Recipe | None,
    options: Mapping[str, Any],
    default: Recipe | None = None,
    unused: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe of one call: the given or the default one, its fields replaced by keywords.

    Args:
        function: the called one, for error messages.
        recipe: its argument, if given.
        options: its other keywords.
        default: what None stands for; None for ``Recipe()``.
        unused: fields that the function does not use -> the way out. They keep their defaults.

    Raises:
        ArgumentError: recipe is no Recipe; a keyword that is no field of it; a field that the
            function does not use; a value out of range.
    """
    name = function.__name__
    known = [field.name for field in fields(Recipe) if field.name not in (unused or {})]
    for option in options:
        if option not in RecipeOptions.__annotations__:
            own = [p.name for p in inspect.signature(function).parameters.values()]
            known += [parameter for parameter in own if parameter not in ("recipe", "options")]
            raise ArgumentError(f"{name} has no option {option!r}{did_you_mean(option, known)}")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ArgumentError(
            f"recipe must be a Recipe, got {recipe!r}: pass Recipe(...) or keywords"
        )
    made = replace(recipe or default or Recipe(), **options)
    for option, way_out in (unused or {}).items():
        if option in options or getattr(made, option) != getattr(Recipe, option):
            raise ArgumentError(f"{name} does not use the recipe's {option}: {way_out}")
    return made
