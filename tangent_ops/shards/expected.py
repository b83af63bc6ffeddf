"""Estimates what a shard's job will write, and how long it will take, from a few of its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from tangent_ops.composition.statistics_file import file_content
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact import fit_exact
from tangent_ops.exact.collect import statistics
from tangent_ops.model.core_basis import core_basis
from tangent_ops.model.linearize import linearize
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.data import ImageData, Samples
from tangent_ops.shards.job import device, job_problem
from tangent_ops.shards.recipe import ShardRecipe
from tangent_ops.training.fit import fit

_T = TypeVar("_T")
_MOST = 8  # images
_BUDGET = 1.0  # seconds of a forward pass over them


@dataclass(frozen=True)
class Expected:
    """What a job will take.

    Attributes:
        parameters: numbers that are trained.
        bytes: size of a shard's delta, or statistics.
        images: number of images that were timed.
        once: seconds per image, to read it and run the frozen blocks on it, or all that a method
            without epochs does.
        repeated: seconds per image and epoch, of a step.
        seen: seconds per validation image, to read and classify it.
        again: seconds per validation image and epoch, to classify it.
    """

    parameters: int
    bytes: int
    images: int
    once: float
    repeated: float
    seen: float
    again: float

    def seconds(self, samples: int, epochs: int, validation: int = 0) -> float:
        """The time of a shard's job, if it grows with the numbers of images."""
        trained = samples * (self.once + epochs * self.repeated)
        return trained + validation * (self.seen + epochs * self.again)


def expected(
    model: nn.Module,
    config: Mapping[str, Any],
    recipe: ShardRecipe,
    data: ImageData,
    public: ImageData | None,
) -> Expected:
    """Measure one step, after one that warms up, on up to eight images, in a few seconds.

    Args:
        model: the anchor; its weights do not matter.
        config: how images are prepared, as `AnchorInfo.input` holds it.
        recipe: of the run.
        data: the run's images.
        public: those of the basis, with the method "statistics".

    Raises:
        SampleError: an image cannot be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        samples = data.open(config, augment=recipe.augment)
        known = None if public is None else public.open(config)
        return _measured(model.to(device()), recipe, samples, known)
    finally:
        torch.set_num_threads(threads)


def _measured(
    model: nn.Module, recipe: ShardRecipe, samples: Samples, public: Samples | None
) -> Expected:
    few, seen = _few(model, samples, recipe)
    if recipe.method == "statistics":
        assert public is not None
        some = Subset(public, range(min(len(public), _MOST)))
        basis = core_basis(model, some, recipe.core, trainable=recipe.trainable(model) or "")
        tangent = linearize(model, core=basis)
        found, taken = _timed(lambda: statistics(tangent, few, progress=False))
        once = taken / len(few)
        stored, _ = file_content(found)  # less than in memory
        size = sum(tensor.nbytes for tensor in stored.values())
        return Expected(_trained(tangent), size, len(few), once, 0.0, 0.0, 0.0)
    tangent = linearize(model, recipe.trainable(model), rank=recipe.rank, basis=recipe.basis)
    size = sum(value.numel() * value.element_size() for value in tangent.delta_dict().values())
    if recipe.method == "exact":

        def fit_few() -> None:
            tangent.zero_()
            fit_exact(job_problem(tangent, few, recipe, False), recipe.tol)

        once = _timed(fit_few)[1] / len(few)
        # A tangent model's pass is three of its anchor's.
        return Expected(_trained(tangent), size, len(few), once, 0.0, 3 * seen, 0.0)
    once, repeated, again = _step(tangent, few, recipe)
    return Expected(_trained(tangent), size, len(few), once, repeated, seen, again)


def _few(model: nn.Module, samples: Samples, recipe: ShardRecipe) -> tuple[Samples, float]:
    """As many images as a forward pass takes about a second for, and the seconds of one."""
    with torch.no_grad():
        model(samples[0][0][None].to(device()))  # warms up
        began = time.perf_counter()
        model(samples[0][0][None].to(device())).cpu()
        taken = time.perf_counter() - began
    count = min(_MOST, recipe.batch_size, len(samples), int(_BUDGET / max(taken, 1e-6)))
    step = len(samples) // max(1, count)  # of different classes, where the images are sorted
    return samples.subset(samples.ids[:: max(1, step)][: max(1, count)]), taken


def _step(tangent: LinearizedModel, few: Samples, recipe: ShardRecipe) -> tuple[float, ...]:
    """Seconds per image: once, of a step, and of a forward pass."""
    began = time.perf_counter()
    inputs = torch.stack([image for image, _ in few]).to(device())
    targets = torch.tensor(few.targets)
    read = time.perf_counter() - began
    trained: nn.Module = tangent
    if recipe.cached:
        try:
            trunk, trained = tangent.split()
        except UnsupportedError:
            pass
        else:
            with torch.no_grad():
                inputs = trunk(inputs)
            read = time.perf_counter() - began
    data = TensorDataset(inputs.cpu(), targets)
    _, step = _timed(lambda: fit(trained, data, epochs=1, batch_size=len(targets), progress=False))
    with torch.no_grad():
        began = time.perf_counter()
        trained(inputs).cpu()
        forward = time.perf_counter() - began
    again = 0.0 if recipe.cached else read  # without a cache every epoch reads the images
    count = len(few)
    return (read - again) / count, (step + again) / count, forward / count


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """What some work gives, and its seconds, after a first time that warms up."""
    work()
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _trained(tangent: nn.Module) -> int:
    return sum(p.numel() for p in tangent.parameters() if p.requires_grad)
