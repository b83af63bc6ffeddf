"""Fit a tangent model with differential privacy: DP-SGD on a problem that is convex."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import distributed
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from tangent_ops.data import check_integer, place, unpack
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss, MeanOfSamples, RescaledSquareLoss
from tangent_ops.model.features import cache_features
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase, noise_multiplier_for
from tangent_ops.privacy.checks import (
    check_contents,
    check_dataset,
    check_failure,
    check_model,
    check_positive,
)
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.optimizer import PrivateOptimizer
from tangent_ops.privacy.per_sample.gradients import MODES, PerSampleGradients
from tangent_ops.privacy.sampling import PoissonBatches
from tangent_ops.privacy.state import State
from tangent_ops.privacy.statement import (
    ADD_OR_REMOVE,
    PrivacyStatement,
    attach,
    check_adjacency,
    make_statement,
)
from tangent_ops.training.fit import SCHEDULES

# Their steps are of noisy gradients; no data are read to make them.
OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
}
ASSUMES = (
    "the anchor, its head included, and the preprocessing do not depend on these samples",
    "nor do the options of this fit; what was chosen by trying on these samples costs more",
    "one sample is one person's: who has k of them has the protection of k (group privacy)",
    "how many samples and steps there are is public; losses and gradients of the fit are not",
)


@dataclass(frozen=True)
class PrivateFit:
    """What a private fit gave.

    There is no loss or gradient norm in it: they are of the private data, and nothing pays for
    them. Take the accuracy from public data.

    Attributes:
        statement: what is promised.
        delta: a copy of the deltas, with the statement in its meta, where `save_delta` keeps it.
        steps: T.
        seconds: wall time, caching of features included.
    """

    statement: PrivacyStatement
    delta: Delta
    steps: int
    seconds: float


def fit_private(
    tangent: LinearizedModel,
    dataset: Dataset[Any],
    *,
    delta: float,
    max_grad_norm: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    expected_batch_size: float = 256,
    steps: int = 100,
    loss: Loss | None = None,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    l2: float = 0.0,
    schedule: str = "constant",
    mode: str = "bookkeeping",
    physical_batch_size: int = 64,
    seed: int | None = None,
    secure_mode: bool = False,
    start: PrivacyStatement | Literal["zero", "public"] = "zero",
    public_preprocessing: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    cache: bool | str | os.PathLike[str] = False,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PrivateFit:
    """Train the deltas so that they tell hardly anything of any one sample: (ε, δ)-privately.

    DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016). In each of T steps
    every sample is drawn with probability q = E/N on its own; its gradient is clipped to norm C;
    the sum gets Gaussian noise of deviation σ C in every entry, is divided by E, and makes a step.
    Adding or removing one sample changes the odds of any outcome by a factor of e^ε at most, but
    for outcomes of probability δ.

    In a group of processes (`torch.distributed` is initialised) each takes its part of every batch,
    of the same data set; the noise is added once. Autocast is off here.

    Args:
        tangent: its deltas are where it starts, and are set at the end.
        dataset: map-style, of (input, target), each sample once.
        delta: the δ above, below 1/N.
        max_grad_norm: C, in the Euclidean norm over all deltas together.
        target_epsilon: ε; σ is the smallest that reaches it. Or else:
        noise_multiplier: σ, positive.
        expected_batch_size: E, from 1 to N.
        steps: T.
        loss: (logits, targets) -> mean of the samples' losses; None for `RescaledSquareLoss()`.
        lr: learning rate at the start.
        optimizer: "adamw" (weight decay 0), "sgd" or "momentum" (0.9).
        l2: weight of l2/2 ‖Δ‖², whose gradient is added without noise.
        schedule: as in `fit`.
        mode: of the clipped sums; see `PerSampleGradients.clipped_sum`.
        physical_batch_size: at most so many samples are in memory at a time.
        seed: for runs that are repeated to the bit, in tests. Who knows it takes the noise off
            again. None: the operating system draws one, and it is forgotten.
        secure_mode: sampling and noise from the operating system, without any generator, and noise
            that does not give itself away by rounding; see `NoiseSource`.
        start: "zero": the deltas are zeros. A statement: they were trained on these samples with
            that guarantee, which is added up. "public": they depend on no private sample.
        public_preprocessing: say that what was fitted to data in the data set's preprocessing was
            fitted to public data.
        checkpoint: a file to go on from if it is there, and to keep up to date; removed at the end.
            It holds the state of the noise's generator: keep it as secret as the data.
        checkpoint_every: steps between two writings.
        cache: as in `fit`.
        workers: processes that load samples.
        device: moves the model there first.
        progress: show a progress bar.

    Raises:
        ArgumentError: an argument other than these; deltas that are not zero while start="zero"; a
            sample that is in the data twice, by index or by content; a checkpoint of another fit.
        UnsupportedError: preprocessing fitted to data; a batch norm that uses its batch; a
            parameter without per-sample gradients; cache, for a model that cannot be split.
        NonFiniteLossError: the gradient of a sample is NaN or infinite; the deltas are as after the
            last step.
    """
    began = time.perf_counter()
    check_model(tangent)
    samples = check_dataset(dataset, public_preprocessing)
    check_failure(delta, samples)
    check_positive(max_grad_norm=max_grad_norm, lr=lr)
    check_integer("steps", steps, 1)
    check_integer("physical_batch_size", physical_batch_size, 1)
    check_integer("checkpoint_every", checkpoint_every, 1)
    check_integer("workers", workers, 0)
    if not 1 <= expected_batch_size <= samples:
        raise ArgumentError(
            f"expected_batch_size must be from 1 to the number of samples, {samples}, "
            f"got {expected_batch_size}"
        )
    if not l2 >= 0:
        raise ArgumentError(f"l2 must not be negative, got {l2}")
    _one_of("optimizer", optimizer, OPTIMIZERS)
    _one_of("schedule", schedule, SCHEDULES)
    _one_of("mode", mode, MODES)
    goes_on = checkpoint is not None and os.path.exists(checkpoint)
    before = _check_start(tangent, start, goes_on)
    rate = expected_batch_size / samples
    sigma = _noise_multiplier(target_epsilon, noise_multiplier, delta, rate, steps, before)
    noise = NoiseSource(seed, secure_mode)
    group = distributed.is_available() and distributed.is_initialized()

    loader = DataLoader(dataset, min(samples, 64), num_workers=workers, generator=torch.Generator())
    check_contents(loader)
    device = place(tangent, device)
    model: LinearizedModel = tangent
    if cache is not False:
        trunk, model = tangent.split()
        dataset = cache_features(trunk, loader, None if cache is True else cache, progress=progress)
    own_loss: Loss = RescaledSquareLoss() if loss is None else loss
    gradients, mean = _prepared(model, dataset, own_loss, device)

    parameters = model.deltas()
    stepper = OPTIMIZERS[optimizer](list(parameters.values()), lr)
    private = PrivateOptimizer(
        stepper,
        noise,
        noise_multiplier=sigma,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        l2=l2,
        group=group,
    )
    key = _key(seed, secure_mode, group)
    state = State(parameters, stepper, noise, key)
    if checkpoint is not None:
        options = (sigma, rate, steps, max_grad_norm, repr(loss), lr, optimizer, l2, schedule)
        state.keep(
            checkpoint,
            checkpoint_every,
            {
                "anchor": tangent.fingerprint,
                "basis": str(tangent.basis_fingerprint),
                "samples": str(samples),
                "options": repr((*options, seed, secure_mode, [*before])),
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
    # Its own generator keeps the loader from drawing a worker seed from the caller's.
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
    with bar, memory as batches:
        for batch in batches:
            for options_of in stepper.param_groups:
                options_of["lr"] = lr * SCHEDULES[schedule](state.step / steps)
            sums = {p: torch.zeros_like(p, requires_grad=False) for p in parameters.values()}
            if batch is not None:
                inputs, targets = unpack(batch, device)
                mean.check(targets)
                found = gradients.clipped_sum(inputs, targets, own_loss, max_grad_norm, mode)
                sums = {parameters[name]: value for name, value in found.items()}
            if private.take(sums):
                state.advance()
                bar.update()
    statement = make_statement(
        mechanism=f"DP-SGD ({optimizer}): Poisson-subsampled Gaussian, clipped gradients",
        phases=(Phase(sigma, rate, steps),),
        clip=max_grad_norm,
        delta=delta,
        sampling=f"in each step every sample with probability {rate:g}, on its own (Poisson)",
        noise=noise.words,
        assumes=_assumed(start, public_preprocessing, seed),
    )
    if isinstance(start, PrivacyStatement):  # what it assumes has to hold, too
        statement = replace(start, delta=delta).then(statement)
    state.remove()
    trained = attach(tangent.delta_dict(), statement)
    return PrivateFit(statement, trained, steps, time.perf_counter() - began)


def _prepared(
    model: LinearizedModel, dataset: Dataset[Any], loss: Loss, device: torch.device
) -> tuple[PerSampleGradients, MeanOfSamples]:
    """What gives the gradients, and what keeps a loss from mixing samples."""
    few = [dataset[index] for index in range(min(4, len(dataset)))]  # pyright: ignore
    inputs, targets = unpack(default_collate(few), device)
    gradients = PerSampleGradients(model, inputs)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2)).to(inputs)
    with torch.no_grad():
        logits = model(noise)
    return gradients, MeanOfSamples(loss, logits, targets)


def _check_start(
    tangent: LinearizedModel, start: PrivacyStatement | str, goes_on: bool
) -> tuple[Phase, ...]:
    """What was spent on the deltas before. A checkpoint's own replace them."""
    if isinstance(start, PrivacyStatement):
        check_adjacency(ADD_OR_REMOVE, start.adjacency)
        return start.phases
    _one_of("start", start, ("zero", "public"))
    moved = [name for name, delta in tangent.deltas().items() if delta.detach().any()]
    if start == "zero" and moved and not goes_on:
        raise ArgumentError(
            f"the deltas are not zero ({moved[0]}), and may come from private data: set them to "
            "zero; or pass start=, the PrivacyStatement that they were trained with, or "
            "'public' if they depend on no private sample"
        )
    return ()


def _noise_multiplier(
    target_epsilon: float | None,
    noise_multiplier: float | None,
    delta: float,
    rate: float,
    steps: int,
    before: Sequence[Phase],
) -> float:
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ArgumentError("give one of target_epsilon and noise_multiplier")
    if noise_multiplier is not None:
        check_positive(noise_multiplier=noise_multiplier)
        return noise_multiplier
    assert target_epsilon is not None
    check_positive(target_epsilon=target_epsilon)
    return noise_multiplier_for(target_epsilon, delta, sample_rate=rate, steps=steps, before=before)


def _key(seed: int | None, secure: bool, group: bool) -> tuple[int, ...] | None:
    """Of the batches that are drawn; the same in all processes of a group."""
    if secure and not group:
        return None
    keys = [(secrets.randbits(128),) if seed is None else (seed, 1)]  # 1: not the noise's own
    if group:
        distributed.broadcast_object_list(keys, 0)
    return keys[0]


def _collate(samples: list[Any]) -> Any:
    return default_collate(samples) if samples else None


def _assumed(start: object, public_preprocessing: bool, seed: int | None) -> tuple[str, ...]:
    said = []
    if start == "public":
        said.append(
            "the deltas that it started from depend on no private sample (said by the user)"
        )
    if public_preprocessing:
        said.append(
            "what the preprocessing learned, it learned from public data (said by the user)"
        )
    if seed is not None:
        said.append("the seed stays secret")
    return (*ASSUMES, *said)


def _one_of(name: str, value: object, choices: object) -> None:
    if value not in [*choices]:  # pyright: ignore[reportGeneralTypeIssues]
        raise ArgumentError(f"{name} must be one of {[*choices]}, got {value!r}")  # pyright: ignore
