"""`find_lr`: a learning-rate range test, which trains a little and puts everything back."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops import pictures
from tangent_ops.checks import check_integer
from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.files import check_target
from tangent_ops.model.allocator import keep_memory
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.training.loop import (
    backward,
    cached_loader,
    check_group,
    check_precision,
    seeded,
)
from tangent_ops.training.options import OPTIMIZERS, Recipe, RecipeOptions, recipe_of
from tangent_ops.training.processes import Batch, Group
from tangent_ops.training.subnormals import flushed_subnormals

FEWEST = 10  # steps
WINDOW = 10  # a smoothed loss is the mean over this part of the steps, 1/10
DIVERGED = 3  # times the fall so far, or the lowest loss if that is more: a rise that ends the test
_OWN = "find_lr raises the rate itself, from low to high in so many steps"
OWN = {name: _OWN for name in ("lr", "epochs", "schedule")}  # fields that only `fit` uses


@dataclass(frozen=True)
class LrRange:
    """The losses of a training whose learning rate rises with every step.

    Attributes:
        lrs: the learning rates, rising by one factor from step to step; until the training
            diverged, or up to the highest.
        losses: at each step the objective on its batch, penalty included, before that step: what
            the rates before it have made of the model.
        smoothed: the same, each the mean of a tenth of all steps around it; fewer at the ends.
    """

    lrs: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, per factor of the rate.

        Only rates up to the lowest smoothed loss count. None if that is the first one: then no
        rate made the loss fall, so try lower ones, or more steps.
        """
        best = int(np.argmin(self.smoothed))
        if best == 0:
            return None
        slopes = np.gradient(np.asarray(self.smoothed), np.log(self.lrs))
        return float(self.lrs[int(np.argmin(slopes[: best + 1]))])

    def __repr__(self) -> str:
        rates = f"{len(self.lrs)} rates from {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}"
        found = "none" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"LrRange({rates}, suggestion {found})"

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write the losses against the rates, with the suggestion, as a PNG.

        Args:
            path: of the file, in a folder that exists.

        Returns:
            The path.

        Raises:
            ArgumentError: the path is a folder, or in a folder that does not exist.
            UnsupportedError: matplotlib is not installed (extra ``plots``).
        """
        check_target(Path(path))
        with pictures.styled():
            return pictures.save(_draw(self), path)


def find_lr(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None = None,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    device: str | torch.device | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
    **options: Unpack[RecipeOptions],
) -> LrRange:
    """Try learning rates for `fit`: train with a rate that rises with every step.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017
    (arXiv:1506.01186). The test ends early once the loss is not finite, or once its mean over a
    tenth of the steps has risen above its lowest by three times what it had fallen or three times
    that lowest mean, whichever is more.

    For a tangent model and a quadratic loss the highest rate is known: full-batch gradient descent
    converges if and only if the rate is below 2 / λ_max, where λ_max is the largest eigenvalue of
    the objective's Hessian, and with momentum β below 2 (1 + β) / λ_max; "sgd" and "momentum" here
    have β = 0.9. The suggestion needs no λ_max, and fits AdamW and mini-batches, too.

    Afterwards parameters, buffers, gradients and the states of all generators are as before, bit
    for bit, also after an error or Ctrl-C. Train and eval modes are not touched.

    Args:
        model: as in `fit`.
        data: as in `fit`; it is read again from its start if it has fewer batches than steps.
        recipe: as in `fit`; its lr, epochs and schedule are not used.
        low: the first rate.
        high: the last rate.
        steps: number of rates, at least 10.
        device: as in `fit`.
        cache: as in `fit`: the frozen blocks run once. Worth it if steps exceed an epoch.
        progress: show a progress bar.
        options: fields of the `Recipe`, which replace those of `recipe`.

    Returns:
        Rates and losses, with a suggestion and a plot.

    Raises:
        ArgumentError: as in `fit`; low, high or steps out of range.
        UnsupportedError: as in `fit`; in a group of processes: one process finds the same rates,
            as a group takes the steps of one.
        NonFiniteLossError: the loss or its gradient is not finite before the first step.
    """
    recipe = recipe_of(find_lr, _of_fit(recipe), options, unused=OWN)
    check_integer("steps", steps, FEWEST)
    rates = (low, high)
    if not all(isinstance(rate, (int, float)) for rate in rates) or not 0 < low < high < math.inf:
        raise ArgumentError(f"low and high must be 0 < low < high, got {low!r} and {high!r}")
    loader = as_loader(data, recipe.batch_size, shuffle=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArgumentError("model has no trainable parameters: all have requires_grad=False")
    if cache is not False and not isinstance(model, LinearizedModel):
        raise ArgumentError(f"cache needs a LinearizedModel, got a {type(model).__name__}")
    where = place(model, device)
    group = Group(where)
    if group.world > 1:
        raise UnsupportedError(
            "find_lr in a group of processes: call it in one process before the group starts; a "
            "group takes the same steps"
        )
    check_group(group, model, loader, recipe)
    check_precision("find_lr", model, where, recipe)
    if where.type == "cpu":
        keep_memory()
    lrs = np.geomspace(low, high, steps).tolist()
    with _kept(model):
        if isinstance(model, LinearizedModel) and cache is not False:
            trunk, model = model.split()
            path = None if isinstance(cache, bool) else cache
            loader = cached_loader(trunk, loader, path, where, recipe, progress)
        losses = _losses(model, parameters, loader, group, recipe, lrs, progress)
    width = steps // WINDOW
    smoothed = [
        float(np.mean(losses[max(0, k - width // 2) : k + width // 2 + 1]))
        for k in range(len(losses))
    ]
    return LrRange(lrs[: len(losses)], losses, smoothed)


def _of_fit(recipe: Recipe | None) -> Recipe | None:
    """The recipe without what only `fit` uses."""
    if not isinstance(recipe, Recipe):
        return recipe
    return replace(recipe, **{name: getattr(Recipe, name) for name in OWN})


def _losses(
    model: nn.Module,
    parameters: list[nn.Parameter],
    loader: DataLoader[Any],
    group: Group,
    recipe: Recipe,
    lrs: Sequence[float],
    progress: bool,
) -> list[float]:
    """The objective before each step, until the training diverges."""
    optimizer = OPTIMIZERS[recipe.optimizer](parameters, lrs[0])
    width = max(1, len(lrs) // WINDOW)
    losses, means = [], []
    bar = tqdm(total=len(lrs), desc="find_lr", unit="step", disable=not progress)
    with seeded(recipe.seed, group.device, loader), flushed_subnormals(group.device), bar:
        for lr, batch in zip(lrs, _again_and_again(loader, group), strict=False):
            for settings in optimizer.param_groups:
                settings["lr"] = lr
            optimizer.zero_grad()
            objective = backward(model, batch, parameters, group, recipe)
            if objective is None:
                break
            losses.append(objective)
            means.append(float(np.mean(losses[-width:])))
            lowest = min(means)
            if means[-1] - lowest > DIVERGED * max(means[0] - lowest, abs(lowest)):
                break
            optimizer.step()
            bar.set_postfix(lr=f"{lr:.1e}", loss=f"{objective:.4g}", refresh=False)
            bar.update()
    if not losses:
        raise NonFiniteLossError(
            "the loss or its gradient is not finite before the first step: check the inputs for NaN"
        )
    return losses


def _again_and_again(loader: DataLoader[Any], group: Group) -> Iterator[Batch]:
    """The batches of the loader, epoch after epoch."""
    while True:
        count = 0
        for batch in loader:
            count += 1
            yield unpack(batch, group.device)
        if count == 0:
            raise ArgumentError("data has a length, but yielded no batch")


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers and gradients at the end, bit for bit."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    changed: list[Tensor] = [*trained, *model.buffers()]
    before = [tensor.detach().clone() for tensor in changed]
    gradients = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient


def _draw(found: LrRange) -> Any:
    """The figure of `LrRange.plot`; inside `pictures.styled`."""
    figure = pictures.new_figure(height=4.0)
    axes = figure.subplots()
    axes.plot(found.lrs, found.losses, color=pictures.GREY, alpha=0.45, linewidth=1, label="loss")
    axes.plot(found.lrs, found.smoothed, color=pictures.TANGENT, label="smoothed", linewidth=2.2)
    if (lr := found.suggestion) is not None:
        at = found.smoothed[list(found.lrs).index(lr)]
        words = f"suggestion: {lr:.2g}"
        axes.plot([lr], [at], "o", color=pictures.ORDINARY, label=words, markersize=9)
    start, lowest = found.smoothed[0], min(found.smoothed)
    margin = 0.15 * (start - lowest) or 0.15 * abs(start) or 1.0
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss on the batch")
    axes.set_ylim(min(min(found.losses), lowest) - margin, max(found.losses[0], start) + 3 * margin)
    axes.minorticks_off()
    pictures.legend_above(figure, columns=3)
    return figure
