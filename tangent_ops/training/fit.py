"""Fit a model by gradient descent: the deltas of a tangent model, any module, a linear probe."""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, check_integer, place, unpack
from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import cache_features
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.training.head import PreLogits, zero_head
from tangent_ops.training.options import OPTIMIZERS, SCHEDULES, Loss, Options
from tangent_ops.training.processes import (
    Batch,
    Group,
    check_module,
    check_statistics,
    frozen_fingerprint,
    layout,
)


@dataclass
class History:
    """What happened in a `fit`.

    Attributes:
        loss: of each epoch, the mean over its samples of the objective, penalty included.
        lr: of each epoch, the learning rate of its first step.
        steps: optimizer steps taken.
        seconds: wall time, caching of features included.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def fit(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss | None = None,
    epochs: int = 15,
    lr: float = 1e-4,
    batch_size: int = 32,
    optimizer: str = "adamw",
    l2: float = 0.0,
    schedule: str = "cosine",
    seed: int = 0,
    amp: bool | None = None,
    device: str | torch.device | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
    accumulate: int = 1,
) -> History:
    """Train a model's parameters in place; for a `LinearizedModel` these are its deltas.

    Minimises mean loss + l2/2 * (sum of the squared trainable parameters). For a tangent model and
    a convex loss this is the convex problem of Liu, Golatkar, Soatto: "Tangent Transformers for
    Composition, Privacy and Removal" (TAFT), ICLR 2024. The paper's code adds the norm itself, not
    its square: that penalty is not quadratic, so what is exact for quadratic problems (removal
    with a certificate, lossless composition) would not hold.

    Runs with the same seed on a CPU give the same parameters bit for bit. Train and eval modes stay
    as the caller set them; gradients of the trained parameters are cleared.

    In a group of processes (`torch.distributed` is initialised, as by torchrun) each calls this
    with the same model, data and options, and takes its part of every batch; all read all batches.
    Trained parameters start as the first process has them, gradients are summed, and every process
    ends with the same parameters and history. They are one process's but for what a model in train
    mode draws (dropout), and for the order of sums: 2e-7 of the deltas' norm after 60 steps of SGD
    in float32, on a small ViT and two CPU processes. AdamW also makes steps of rounding where that
    is all the gradient, as of the keys' biases, which change no output.

    Args:
        model: a module of one input; parameters with requires_grad are trained.
        data: a Dataset of (input, target), batched and shuffled here, or a DataLoader.
        loss: (logits, targets) -> scalar mean over the batch; logits of 16-bit models are passed
            in float32. None for `RescaledSquareLoss()`.
        epochs: passes over the data.
        lr: learning rate at the start.
        batch_size: of a Dataset; a DataLoader has its own.
        optimizer: "adamw" (weight decay 0) or "sgd" (momentum 0.9).
        l2: weight of the squared norm; its gradient l2 * p is added to the loss's.
        schedule: per step: "cosine" to 0, "step" (times 0.1 after 1/2 and again after 3/4 of the
            steps) or "constant".
        seed: of everything drawn here: order of the samples, dropout, random augmentation. The
            states of torch's, numpy's, Python's and the loader's generators are put back.
        amp: bfloat16 autocast; None: on CUDA devices that have it, or as the caller's own
            ``with torch.autocast(...)`` around this call says.
        device: moves the model there first; None for where it is. Batches follow the model.
        cache: compute what the frozen blocks below the first trained one give only once, in memory
            (True) or in a memory-mapped file in this folder; for a `LinearizedModel` and inputs
            without random augmentation. In a group every process computes all, and keeps its own
            file, in ``rank0``, ``rank1`` and so on of the folder.
        progress: show a progress bar; in a group the first process does.
        accumulate: parts, as equal as can be, that each process runs its share of a batch in, to
            save memory; there is one step a batch. With a loss that is a mean of the samples' own
            the step is the whole batch's but for the order of sums; one that compares samples of a
            batch only sees those of a part.

    Returns:
        The losses and learning rates per epoch.

    Raises:
        ArgumentError: an argument out of range; data that is empty or yields something else; no
            trainable parameters, or a loss that does not depend on them; processes of a group that
            differ in model, data or options.
        UnsupportedError: cache, for a model that cannot be split; float16, which needs a loss
            scaler; parts of batches (accumulate, a group) for a batch norm that normalises by
            them; in a group, a DistributedDataParallel or sharded parameters that are trained.
        NonFiniteLossError: the loss or its gradient is NaN or infinite, in any process of a group;
            the parameters are as before that step.
    """
    start = time.perf_counter()
    options = Options(loss, epochs, lr, optimizer, l2, schedule, seed, amp, progress, accumulate)
    loader = as_loader(data, batch_size, shuffle=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model has no trainable parameters: all have requires_grad=False")
    if cache is not False and not isinstance(model, LinearizedModel):
        raise ArgumentError(
            f"cache needs a LinearizedModel, got a {type(model).__name__}: split an ordinary one "
            "with tangent_ops.model.features.split_model and fit its tail on cache_features"
        )
    where = place(model, device)
    group = Group(where)
    options = _start(group, model, loader, options)
    if isinstance(model, LinearizedModel) and cache is not False:
        trunk, model = model.split()
        path = None if isinstance(cache, bool) else cache
        if path is not None and group.world > 1:
            path = os.path.join(path, f"rank{group.rank}")
        loader = _cached(trunk, loader, path, where, options)
    history = _train(model, loader, group, options)
    history.seconds = time.perf_counter() - start
    return history


def fit_head(
    model: nn.Module,
    data: Data,
    *,
    num_classes: int | None = None,
    loss: Loss | None = None,
    epochs: int = 15,
    lr: float = 1e-2,
    batch_size: int = 32,
    optimizer: str = "adamw",
    l2: float = 0.0,
    schedule: str = "cosine",
    seed: int = 0,
    amp: bool | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[nn.Module, History]:
    """Train a linear probe: a new classifier, from zeros, on features computed once.

    In a group of processes it works as `fit`; each computes all features.

    Linearize a model after this, not before: while its classifier is zero, no block below has a
    derivative, and a tangent model there is no more than a probe.

    Args:
        model: a timm model (forward_features, forward_head, get_classifier, reset_classifier) whose
            classifier is one linear layer. It is not changed.
        data: as in `fit`, without random augmentation: it would be drawn once.
        num_classes: of the new classifier; None for as many as the model has.
        loss: as in `fit`.
        epochs: as in `fit`.
        lr: as in `fit`, but larger: a probe takes a higher rate than the blocks.
        batch_size: as in `fit`.
        optimizer: as in `fit`.
        l2: as in `fit`; of the classifier only.
        schedule: as in `fit`.
        seed: as in `fit`.
        amp: as in `fit`.
        device: where the copy goes; None for where the model is.
        progress: as in `fit`.

    Returns:
        A copy of the model with the trained classifier, in eval mode, and the history.

    Raises:
        ArgumentError: as in `fit`; num_classes is missing for a model without classifier.
        UnsupportedError: not a timm model, or its classifier is not one linear layer.
        NonFiniteLossError: as in `fit`.
    """
    start = time.perf_counter()
    options = Options(loss, epochs, lr, optimizer, l2, schedule, seed, amp, progress)
    if num_classes is not None:
        check_integer("num_classes", num_classes, 1)
    loader = as_loader(data, batch_size, shuffle=True)
    model = copy.deepcopy(model).eval()
    with _seeded(seed, torch.device("cpu")):  # reset_classifier draws weights
        head = zero_head(model, num_classes)
    where = place(model, device)
    group = Group(where)
    options = _start(group, model, loader, options)
    if group.world > 1:
        group.agree(model=fingerprint(model.state_dict()))
    loader = _cached(PreLogits(model), loader, None, where, options)
    history = _train(head, loader, group, options)
    history.seconds = time.perf_counter() - start
    return model, history


def _start(group: Group, model: nn.Module, loader: DataLoader[Any], options: Options) -> Options:
    """Check that all processes of a group train the same; give the options of this one."""
    if group.world > 1 or options.accumulate > 1:
        check_statistics(model)
    if group.world == 1:
        return options
    if isinstance(model, LinearizedModel):
        check_module(model.delta)
        fixed = (model.fingerprint, model.basis_fingerprint)
    else:
        check_module(model)
        fixed = frozen_fingerprint(model)
    names = {entry.name for entry in fields(options)} - {"loss", "progress"}  # no repr, no matter
    given = {name: getattr(options, name) for name in sorted(names)}
    group.agree(model=(layout(model), fixed), data=len(loader), **given)
    return replace(options, progress=options.progress and group.rank == 0)


def _train(model: nn.Module, loader: DataLoader[Any], group: Group, options: Options) -> History:
    device = group.device
    if torch.float16 in (options.precision(device), *(p.dtype for p in model.parameters())):
        raise UnsupportedError(
            "fit in float16: it scales no loss, and small gradients would vanish. Use bfloat16, or "
            "your own loop with torch.amp.GradScaler"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[options.optimizer](parameters, options.lr)
    group.broadcast(parameters)
    steps = options.epochs * len(loader)
    history = History()
    bar = tqdm(total=steps, desc="fit", unit="step", disable=not options.progress)
    with _seeded(options.seed, device, loader), bar:
        for epoch in range(options.epochs):
            total = samples = 0
            for batch in group.checked(unpack(batch, device) for batch in loader):
                lr = options.lr * SCHEDULES[options.schedule](history.steps / steps)
                for settings in optimizer.param_groups:
                    settings["lr"] = lr
                if samples == 0:
                    history.lr.append(lr)

                optimizer.zero_grad()
                with group.own_draws(options.seed, history.steps):
                    objective = _backward(model, batch, parameters, group, options)
                if objective is None:
                    optimizer.zero_grad()
                    raise NonFiniteLossError(
                        f"the loss or its gradient is not finite in epoch {epoch + 1} of "
                        f"{options.epochs}, step {history.steps + 1} of {steps}, at lr={lr:.3g}; "
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
    model: nn.Module,
    batch: Batch,
    parameters: list[nn.Parameter],
    group: Group,
    options: Options,
) -> float | None:
    """Set the gradients; return the objective, or None if it or a gradient is not finite."""
    loss = options.loss or RescaledSquareLoss()
    objective = 0.0
    for inputs, targets in group.parts(batch, options.accumulate):
        weight = len(inputs) / len(batch[0])
        if not weight:  # one sample that counts nothing: a sharded model needs every process
            inputs, targets = batch[0][:1], batch[1][:1]
        value = weight * _loss(model, inputs, targets, loss, options)
        with torch.autocast(inputs.device.type, enabled=False):  # a caller's would round once more
            value.backward()
        objective += value.item()
    objective = group.sum(parameters, objective)
    if options.l2:
        for parameter in parameters:
            penalty = options.l2 * parameter.detach()
            parameter.grad = penalty if parameter.grad is None else parameter.grad + penalty
        objective += options.l2 / 2 * nn.utils.get_total_norm(parameters).item() ** 2
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    return objective if math.isfinite(objective) and math.isfinite(norm) else None


def _loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, options: Options
) -> Tensor:
    with options.autocast(inputs.device):
        logits = model(inputs)
    if isinstance(logits, Tensor) and logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    value = loss(logits, targets)
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(f"loss must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ArgumentError("loss does not depend on any trainable parameter of the model")
    return value


def _cached(
    trunk: nn.Module,
    loader: DataLoader[Any],
    path: str | os.PathLike[str] | None,
    device: torch.device,
    options: Options,
) -> DataLoader[Any]:
    """Compute the trunk's outputs once; give a loader of them with the batches of `loader`."""
    if loader.batch_sampler is None:
        raise ArgumentError("features can only be cached for a DataLoader that makes batches")
    in_order = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 32,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    with _seeded(options.seed, device, loader), options.autocast(device):
        features = cache_features(trunk, in_order, path, progress=options.progress)
    return DataLoader(features, batch_sampler=loader.batch_sampler, generator=loader.generator)


@contextmanager
def _seeded(
    seed: int, device: torch.device, loader: DataLoader[Any] | None = None
) -> Iterator[None]:
    """Seed every generator that training draws from; put their states back at the end."""
    owners = (loader, getattr(loader, "sampler", None))
    own = [getattr(owner, "generator", None) for owner in owners]
    states = [(generator, generator.get_state()) for generator in own if generator is not None]
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
