"""What `fit`, `fit_head` and `fit_grouped` share: seeds, cached features, the training loop."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import unpack
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.family import logits_of
from tangent_ops.losses import Loss
from tangent_ops.model.allocator import keep_memory
from tangent_ops.model.features import cache_features
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.training.options import OPTIMIZERS, Recipe
from tangent_ops.training.processes import (
    Batch,
    Group,
    check_module,
    check_statistics,
    frozen_fingerprint,
    layout,
)
from tangent_ops.training.subnormals import flushed_subnormals


@dataclass
class History:
    """The losses and learning rates of a training.

    Attributes:
        loss: of each epoch, the mean over its samples of the objective, penalty included.
        lr: of each epoch, the learning rate of its first step.
        steps: number of optimizer steps.
        seconds: wall time, caching of features included.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        losses = f", loss {self.loss[0]:.4g} to {self.loss[-1]:.4g}" if self.loss else ""
        epochs = f"{len(self.loss)} epochs, {self.steps} steps, {self.seconds:.1f} s"
        return f"History({epochs}{losses})"


def check_group(group: Group, model: nn.Module, loader: DataLoader[Any], recipe: Recipe) -> None:
    """Check that all processes of a group train the same model, with the same data and recipe.

    Raises:
        ArgumentError: they do not.
        UnsupportedError: a batch norm would normalise by part of a batch; a model that averages
            gradients itself, or whose trained parameters are under FSDP.
    """
    if group.world > 1 or recipe.accumulate > 1:
        check_statistics(model)
    if group.world == 1:
        return
    if isinstance(model, LinearizedModel):
        check_module(model.delta)
        fixed = (model.fingerprint, model.basis_fingerprint)
    else:
        check_module(model)
        fixed = frozen_fingerprint(model)
    # The repr of a function holds its address, which differs from process to process.
    given = {f.name: getattr(recipe, f.name) for f in fields(Recipe) if f.name != "loss"}
    group.agree(model=(layout(model), fixed), data=len(loader), **given)


def check_precision(name: str, model: nn.Module, device: torch.device, recipe: Recipe) -> None:
    """Raise UnsupportedError if function `name` would train in float16."""
    if torch.float16 in (recipe.precision(device), *(p.dtype for p in model.parameters())):
        raise UnsupportedError(
            f"{name} in float16: it does not scale the loss, so small gradients would vanish. Use "
            "bfloat16, or your own loop with torch.amp.GradScaler"
        )


def train(
    model: nn.Module, loader: DataLoader[Any], group: Group, recipe: Recipe, progress: bool
) -> History:
    """Train the parameters of a model that have requires_grad.

    Args:
        model: on the group's device.
        loader: of (input, target) batches.
        group: the processes that train together.
        recipe: as in `fit`.
        progress: show a progress bar.

    Returns:
        The history, without its seconds.

    Raises:
        ArgumentError: the loader yields no batch or something else; the loss is no scalar, or
            does not depend on the parameters.
        UnsupportedError: float16.
        NonFiniteLossError: the loss or its gradient is not finite.
    """
    device = group.device
    check_precision("fit", model, device, recipe)
    if device.type == "cpu":
        keep_memory()  # for ordinary models
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[recipe.optimizer](parameters, recipe.lr)
    group.broadcast(parameters)
    steps = recipe.epochs * len(loader)
    history = History()
    bar = tqdm(total=steps, desc="fit", unit="step", disable=not progress or group.rank > 0)
    with seeded(recipe.seed, device, loader), flushed_subnormals(device), bar:
        for epoch in range(recipe.epochs):
            total = samples = 0
            for batch in group.checked(unpack(batch, device) for batch in loader):
                lr = recipe.lr_at(history.steps / steps)
                for settings in optimizer.param_groups:
                    settings["lr"] = lr
                if samples == 0:
                    history.lr.append(lr)

                optimizer.zero_grad()
                with group.own_draws(recipe.seed, history.steps):
                    objective = _backward(model, batch, parameters, group, recipe)
                if objective is None:
                    optimizer.zero_grad()
                    raise NonFiniteLossError(
                        f"the loss or its gradient is not finite in epoch {epoch + 1} of "
                        f"{recipe.epochs}, step {history.steps + 1} of {steps}, at lr={lr:.3g}; "
                        "the parameters are as before this step. Check the inputs for NaN, or try "
                        "a lower lr or amp=False"
                    )
                optimizer.step()

                history.steps += 1
                total += objective * len(batch[0])
                samples += len(batch[0])
                bar.set_postfix(epoch=epoch + 1, loss=f"{objective:.4g}", refresh=False)
                bar.update()
            if samples == 0:
                raise ArgumentError("data has a length, but yielded no batch")
            history.loss.append(total / samples)
    optimizer.zero_grad()
    return history


def _backward(
    model: nn.Module, batch: Batch, parameters: list[nn.Parameter], group: Group, recipe: Recipe
) -> float | None:
    """Set the gradients; return the objective, or None if it or a gradient is not finite."""
    loss = recipe.loss_function
    objective = 0.0
    for inputs, targets in group.parts(batch, recipe.accumulate):
        weight = len(inputs) / len(batch[0])
        if not weight:  # one sample of weight 0: FSDP needs a call in every process
            inputs, targets = batch[0][:1], batch[1][:1]
        with recipe.autocast(inputs.device):
            logits = logits_of(model, inputs)
        value = weight * loss_of(logits, targets, loss)
        with torch.autocast(
            inputs.device.type, enabled=False
        ):  # a caller's context would round once more
            value.backward()
        objective += value.item()
    objective = group.sum(parameters, objective)
    if recipe.l2:
        objective += recipe.l2 / 2 * nn.utils.get_total_norm(parameters).item() ** 2
    norm = penalized_norm(parameters, recipe.l2).item()
    return objective if math.isfinite(objective) and math.isfinite(norm) else None


def loss_of(logits: Any, targets: Tensor, loss: Loss) -> Tensor:
    """The loss of logits; 16-bit logits are cast to float32.

    Raises:
        ArgumentError: it is no scalar, or does not depend on a trained parameter.
    """
    if isinstance(logits, Tensor) and logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    value = loss(logits, targets)
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(f"loss must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ArgumentError("loss does not depend on any trainable parameter of the model")
    return value


def penalized_norm(parameters: list[nn.Parameter], l2: float) -> Tensor:
    """Add the penalty to the gradients; return their norm, not finite if any of them is not."""
    if l2:
        for parameter in parameters:
            penalty = l2 * parameter.detach()
            parameter.grad = penalty if parameter.grad is None else parameter.grad + penalty
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def cached_loader(
    trunk: nn.Module,
    loader: DataLoader[Any],
    path: str | os.PathLike[str] | None,
    device: torch.device,
    recipe: Recipe,
    progress: bool,
) -> DataLoader[Any]:
    """Compute the trunk's outputs once; return a loader of them in the batches of `loader`."""
    if loader.batch_sampler is None:
        raise ArgumentError("features can only be cached for a DataLoader that makes batches")
    in_order = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 32,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    with seeded(recipe.seed, device, loader), recipe.autocast(device):
        features = cache_features(trunk, in_order, path, progress=progress)
    return DataLoader(features, batch_sampler=loader.batch_sampler, generator=loader.generator)


def own_generators(loader: DataLoader[Any] | None) -> list[torch.Generator]:
    """The generators of a loader and its sampler."""
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if generator is not None]


@contextmanager
def seeded(
    seed: int, device: torch.device, loader: DataLoader[Any] | None = None
) -> Iterator[None]:
    """Seed every generator that training draws from; restore their states at the end."""
    states = [(generator, generator.get_state()) for generator in own_generators(loader)]
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for generator, _ in states:
                generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)
