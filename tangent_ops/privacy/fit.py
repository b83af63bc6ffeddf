"""`fit_private`: train a tangent model with differential privacy, by DP-SGD."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import distributed
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from tangent_ops.data import check_choice, check_integer, place, unpack_one
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError
from tangent_ops.family import logits_of
from tangent_ops.losses import Loss, MeanOfSamples
from tangent_ops.model.features import cache_features
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model, check_start
from tangent_ops.privacy.optimizer import PrivateOptimizer
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.per_sample.gradients import MODES, PerSampleGradients
from tangent_ops.privacy.sampling import PoissonBatches
from tangent_ops.privacy.state import State
from tangent_ops.privacy.statement import (
    PrivacyStatement,
    attach,
    make_statement,
)
from tangent_ops.training.options import OPTIMIZERS, Recipe, RecipeOptions, recipe_of
from tangent_ops.training.subnormals import flushed_subnormals

PRIVATE = Recipe(lr=1e-3, schedule="constant")
UNUSED = {
    "epochs": "give Privacy(steps=)",
    "batch_size": "give Privacy(expected_batch_size=), or physical_batch_size for memory",
    "seed": "give Privacy(seed=)",
    "amp": "it computes without autocast",
    "accumulate": "give physical_batch_size",
}
_OPTIMIZERS = {**OPTIMIZERS, "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)}
ASSUMES = (
    "the anchor, its head included, and the preprocessing do not depend on these samples",
    "the options of this fit do not depend on these samples; choosing them by trials costs more",
    "each person has one sample; with k samples the guarantee is weaker (group privacy)",
    "the numbers of samples and steps are public; losses and gradients of the fit are not",
)


@dataclass(frozen=True)
class PrivateFit:
    """The result of a private fit.

    It holds no loss or gradient norm: these reveal private data, and the guarantee does not cover
    them. Measure the accuracy on public data.

    Attributes:
        statement: the guarantee.
        delta: a copy of the deltas, with the statement in its meta, which `save_delta` writes.
        steps: T.
        seconds: wall time, including the caching of features.
    """

    statement: PrivacyStatement
    delta: Delta
    steps: int
    seconds: float


def fit_private(
    tangent: LinearizedModel,
    dataset: Dataset[Any],
    privacy: Privacy,
    recipe: Recipe | None = None,
    *,
    mode: str = "bookkeeping",
    physical_batch_size: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    cache: bool | str | os.PathLike[str] = False,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Unpack[RecipeOptions],
) -> PrivateFit:
    """Train the deltas with (ε, δ)-differential privacy for each sample.

    DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016). In each of T steps
    every sample is drawn independently with probability q = E/N. The drawn samples' gradients are
    clipped to norm C and summed; Gaussian noise of standard deviation σ C is added to every entry
    of the sum; the optimizer makes a step with the result divided by E. With one sample more or
    less, outcomes of probability p have a probability of e^ε p + δ at most.

    In a group of processes (`torch.distributed` is initialised) every process gets the same data
    set and takes its part of every batch; the noise is added once. Autocast is off here. Subnormal
    numbers are flushed to zero as in `fit`.

    Args:
        tangent: its deltas are the start, and are trained in place.
        dataset: map-style, of (input, target), each sample once.
        privacy: the guarantee, clipping, sampling and noise; max_grad_norm is needed.
        recipe: loss, lr, optimizer, l2 and schedule; None for
            ``Recipe(lr=1e-3, schedule="constant")``. The loss is a mean of the samples' losses.
            "sgd" has no momentum here. l2's gradient is added without noise. The other fields are
            not used: `Privacy` has the steps, the batch size and the seed.
        mode: how clipped sums are computed; see `PerSampleGradients.clipped_sum`.
        physical_batch_size: the largest number of samples in memory at a time.
        checkpoint: a file: the fit resumes from it if it exists, updates it, and removes it at the
            end. It holds the state of the noise's generator: keep it as secret as the data.
        checkpoint_every: steps between two writes.
        cache: as in `fit`.
        workers: processes that load samples.
        device: moves the model there first.
        progress: show a progress bar.
        options: fields of the `Recipe`, which replace those of `recipe`.

    Raises:
        ArgumentError: an argument is out of range, unknown or not used here; the deltas are not
            zero and start is "zero"; a sample is in the data twice, by index or by content; the
            checkpoint is of another fit.
        UnsupportedError: preprocessing fitted to data; a batch norm that uses its batch; a
            parameter without per-sample gradients; cache, for a model that cannot be split.
        NonFiniteLossError: the gradient of a sample is NaN or infinite; the deltas are as after the
            last step.
    """
    began = time.perf_counter()
    recipe = recipe_of(fit_private, recipe, options, PRIVATE, UNUSED)
    check_model(tangent)
    samples = check_dataset(dataset, privacy.public_preprocessing)
    privacy.check_failure(samples)
    clip, expected, steps = privacy.max_grad_norm, privacy.expected_batch_size, privacy.steps
    if clip is None:
        raise ArgumentError(
            "fit_private clips each sample's gradient: give Privacy(max_grad_norm=)"
        )
    if not 1 <= expected <= samples:
        raise ArgumentError(
            f"expected_batch_size must be from 1 to the number of samples, {samples}, "
            f"got {expected}"
        )
    check_integer("physical_batch_size", physical_batch_size, 1)
    check_integer("checkpoint_every", checkpoint_every, 1)
    check_integer("workers", workers, 0)
    check_choice("mode", mode, MODES)
    goes_on = checkpoint is not None and os.path.exists(checkpoint)
    before = check_start(tangent, privacy.start, goes_on)
    rate = expected / samples
    sigma = privacy.multiplier(rate, steps, before)
    noise = privacy.noise_source()
    group = distributed.is_available() and distributed.is_initialized()

    loader = DataLoader(dataset, min(samples, 64), num_workers=workers, generator=torch.Generator())
    check_contents(loader)
    device = place(tangent, device)
    model: LinearizedModel = tangent
    if cache is not False:
        trunk, model = tangent.split()
        dataset = cache_features(trunk, loader, None if cache is True else cache, progress=progress)
    loss = recipe.loss_function
    gradients, mean = _prepared(model, dataset, loss, device)

    parameters = model.deltas()
    stepper = _OPTIMIZERS[recipe.optimizer](list(parameters.values()), recipe.lr)
    private = PrivateOptimizer(
        stepper,
        noise,
        noise_multiplier=sigma,
        max_grad_norm=clip,
        expected_batch_size=expected,
        l2=recipe.l2,
        group=group,
    )
    key = _key(privacy, group)
    state = State(parameters, stepper, noise, key)
    if checkpoint is not None:
        of_privacy = (privacy.seed, privacy.secure_mode, [*before])
        state.keep(
            checkpoint,
            checkpoint_every,
            {
                "anchor": tangent.fingerprint,
                "basis": str(tangent.basis_fingerprint),
                "samples": str(samples),
                "options": repr((sigma, rate, steps, clip, recipe, *of_privacy)),
            },
        )
    if group:
        state.check_group()
        for parameter in parameters.values():
            distributed.broadcast(parameter.detach(), 0)

    rank, world = (distributed.get_rank(), distributed.get_world_size()) if group else (0, 1)
    drawn = PoissonBatches(
        samples, rate, steps, state.key, start=state.step, rank=rank, world=world
    )
    # With a generator of its own, the loader draws no worker seed from the global generator.
    loader = DataLoader(
        dataset,
        batch_sampler=drawn,
        collate_fn=_collate,
        num_workers=workers,
        generator=torch.Generator(),
    )
    memory = BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical_batch_size, optimizer=private
    )
    bar = tqdm(
        total=steps, desc="private fit", unit="step", initial=state.step, disable=not progress
    )
    with flushed_subnormals(device), bar, memory as batches:
        for batch in batches:
            for settings in stepper.param_groups:
                settings["lr"] = recipe.lr_at(state.step / steps)
            sums = {p: torch.zeros_like(p, requires_grad=False) for p in parameters.values()}
            if batch is not None:
                inputs, targets = unpack_one(batch, device)
                mean.check(targets)
                found = gradients.clipped_sum(inputs, targets, loss, clip, mode)
                sums = {parameters[name]: value for name, value in found.items()}
            if private.take(sums):
                state.advance()
                bar.update()
    statement = make_statement(
        mechanism=f"DP-SGD ({recipe.optimizer}): Poisson-subsampled Gaussian, clipped gradients",
        phases=(Phase(sigma, rate, steps),),
        clip=clip,
        delta=privacy.delta,
        sampling=f"in each step every sample with probability {rate:g}, independently (Poisson)",
        noise=noise.words,
        assumes=(*ASSUMES, *privacy.assumes),
    )
    statement = privacy.after_start(statement)
    state.remove()
    trained = attach(tangent.delta_dict(), statement)
    return PrivateFit(statement, trained, steps, time.perf_counter() - began)


def _prepared(
    model: LinearizedModel, dataset: Dataset[Any], loss: Loss, device: torch.device
) -> tuple[PerSampleGradients, MeanOfSamples]:
    """The per-sample gradients, and the check that the loss is a mean over samples."""
    few = [dataset[index] for index in range(min(4, len(dataset)))]  # pyright: ignore
    inputs, targets = unpack_one(default_collate(few), device)
    gradients = PerSampleGradients(model, inputs)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2)).to(inputs)
    with torch.no_grad():
        logits = logits_of(model, noise)
    return gradients, MeanOfSamples(loss, logits, targets)


def _key(privacy: Privacy, group: bool) -> tuple[int, ...] | None:
    """The seed of the batches; the same in all processes of a group."""
    if privacy.secure_mode and not group:
        return None
    seed = privacy.seed
    keys = [(secrets.randbits(128),) if seed is None else (seed, 1)]  # 1: unlike the noise's seed
    if group:
        distributed.broadcast_object_list(keys, 0)
    return keys[0]


def _collate(samples: list[Any]) -> Any:
    return default_collate(samples) if samples else None
