"""The objective of a fit over a whole data set: its gradient and Hessian products, in passes."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import Layout, dot
from tangent_ops.files import add_tensor
from tangent_ops.losses import (
    Loss,
    MeanOfSamples,
    RescaledSquareLoss,
    check_convex,
    is_quadratic,
    loss_gradient,
    loss_product,
    made_up,
)
from tangent_ops.model.features import Trunk, cache_features
from tangent_ops.model.linearized import LinearizedModel


class Cotangent(Protocol):
    """Of a batch's outputs, given f, J v, the targets and the batch's number."""

    def __call__(
        self, primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int
    ) -> Tensor: ...


class Problem:
    """F(Δ) = (1/N) Σ_i loss(f(x_i) + J(x_i) Δ, y_i) + l2/2 ‖Δ‖².

    A pass over the data gives the gradient, or the Hessian (1/N) Σ J_iᵀ A_i J_i + l2 I times a
    vector, where A_i is the Hessian of the loss by the logits: exact, since the model is linear in
    Δ. Vectors are flat, see `Layout`. Passes see the samples in the data set's own order.

    Args:
        tangent: the model; its deltas are neither read nor changed.
        data: a Dataset of (input, target), or a DataLoader, which is read in order, whole.
        l2: positive.
        loss: a mean over the batch of each sample's own loss, convex in the logits; tried on all
            classes, and on other targets in the first pass; None for `RescaledSquareLoss()`.
        batch_size: of a Dataset; a DataLoader has its own.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        progress: whether the caching shows a bar.

    Raises:
        ArgumentError: an argument other than these; data that differ between two readings.
        UnsupportedError: cache, for a model that cannot be split.
    """

    def __init__(
        self,
        tangent: LinearizedModel,
        data: Data,
        l2: float,
        loss: Loss | None = None,
        *,
        batch_size: int = 64,
        cache: bool | str | os.PathLike[str] = False,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        check_tangent(tangent)
        check_l2(l2)
        self.whole = tangent
        self.l2 = float(l2)
        self.loss: Loss = RescaledSquareLoss() if loss is None else loss
        self.progress = progress
        loader = in_order(data, batch_size)
        place(tangent, device)
        self._source = loader
        self._trunk: Trunk | None = None
        if cache is not False:
            self._trunk, tangent = tangent.split()
            features = cache_features(
                self._trunk, loader, None if cache is True else cache, progress=progress
            )
            loader = DataLoader(features, batch_size=loader.batch_size)
        self.double = False
        self.loader = loader
        self.samples = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        self.jacobian = Jacobian(tangent)
        self._data_sha256: str | None = None
        self._read_once = False
        self.quadratic = self._look_at_first_batch()

    @property
    def layout(self) -> Layout:
        return self.jacobian.layout

    def in_double(self) -> Problem:
        """The same problem in float64, with a copy of the model."""
        double = copy.copy(self)
        double.double = True
        double.jacobian = self.jacobian.in_double()
        return double

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of inputs and targets, on the model's device."""
        seen = 0
        for batch in self.loader:
            inputs, targets = unpack(batch, self.jacobian.device)
            if not self._read_once:
                self._mean.check(targets)
            if self.double:
                inputs, targets = _double(inputs), _double(targets)
            seen += len(inputs)
            yield inputs, targets
        if seen != self.samples:
            raise ArgumentError(f"data has {self.samples} samples, but yielded {seen}")
        self._read_once = True

    def entering(self, inputs: Tensor) -> Tensor:
        """Inputs, or what the cached part makes of them, as batches have them."""
        inputs = inputs.to(self.jacobian.device)
        inputs = inputs if self._trunk is None else self._trunk(inputs)
        return _double(inputs) if self.double else inputs

    def subset(self, count: int, seed: int = 0) -> Problem:
        """The same objective over some of the samples, drawn without replacement."""
        if count >= self.samples:
            return self
        drawn = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        return self._of(drawn[:count].tolist())

    def without(self, index: int) -> Problem:
        """The same objective over all samples but one."""
        if self.samples == 1:
            raise ArgumentError("data has a single sample: nothing is left without it")
        return self._of([*range(index), *range(index + 1, self.samples)])

    def _of(self, indices: list[int]) -> Problem:
        part = copy.copy(self)
        dataset = Subset(self.loader.dataset, indices)
        part.loader = _loader(dataset, self.loader.batch_size or 1, self.loader)
        part._source = part.loader
        part.samples = len(indices)
        part._data_sha256 = None
        return part

    def logits(self, delta: Tensor) -> list[Tensor]:
        """f + J Δ of every batch."""
        pairs = (self.jacobian.outputs(delta, inputs) for inputs, _ in self.batches())
        return [primal + tangent for primal, tangent in pairs]

    def tangents(self, direction: Tensor) -> list[Tensor]:
        """J v of every batch."""
        return [self.jacobian.outputs(direction, inputs)[1] for inputs, _ in self.batches()]

    def gradient(self, delta: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """F(Δ), its gradient, and the logits of every batch, in one pass.

        Raises:
            NonFiniteLossError: a value or the gradient is NaN or infinite.
        """
        logits: list[Tensor] = []
        total = 0.0

        def cotangent(primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int) -> Tensor:
            nonlocal total
            logits.append(primal + tangent)
            value, gradient = loss_gradient(self.loss, logits[-1], targets)
            share = len(targets) / self.samples
            total += share * value
            return share * gradient

        gradient = self.pull_back(delta, cotangent)
        value = total + self.l2 / 2 * dot(delta, delta)
        gradient.add_(delta, alpha=self.l2)
        if not (math.isfinite(value) and gradient.isfinite().all()):
            raise NonFiniteLossError(
                "the objective or its gradient is not finite: check the inputs for NaN, and a "
                "16-bit model for overflow"
            )
        return value, gradient, logits

    def product(
        self, direction: Tensor, at: Sequence[Tensor] | None = None, *, penalty: bool = True
    ) -> Tensor:
        """The Hessian times a direction, in one pass.

        Args:
            direction: flat.
            at: logits of every batch, where the Hessian is taken; None for a quadratic loss, whose
                Hessian is the same everywhere.
            penalty: False leaves l2 I out.
        """

        def cotangent(primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int) -> Tensor:
            where = primal if at is None else at[number]
            product = loss_product(self.loss, where, targets, tangent)
            return len(targets) / self.samples * product

        product = self.pull_back(direction, cotangent)
        return product.add_(direction, alpha=self.l2) if penalty else product

    @property
    def data_sha256(self) -> str:
        """Of all inputs and targets as they were given, in order; read once, at first use."""
        if self._data_sha256 is None:
            digest = hashlib.sha256()
            for batch in self._source:
                # Sample by sample: the size of the batches does not matter.
                for sample in zip(*unpack(batch, torch.device("cpu")), strict=True):
                    for tensor in sample:
                        add_tensor(digest, tensor)
            self._data_sha256 = digest.hexdigest()
        return self._data_sha256

    def pull_back(self, direction: Tensor, cotangent: Cotangent) -> Tensor:
        """Σ_b J_bᵀ cotangent(f_b, J_b v, y_b, b): one jvp and one vjp over the data."""
        total = self.layout.zeros()
        sums = self.layout.views(total)
        for number, (inputs, targets) in enumerate(self.batches()):
            of_batch = functools.partial(cotangent, targets=targets, number=number)
            for part, added in zip(
                sums, self.jacobian.pull_back(direction, inputs, of_batch), strict=True
            ):
                part.add_(added)
        return total

    def _look_at_first_batch(self) -> bool:
        readings = [next(iter(self.loader)) for _ in range(2)]
        (inputs, targets), again = (unpack(batch, self.jacobian.device) for batch in readings)
        same = [torch.equal(a, b) for a, b in zip((inputs, targets), again, strict=True)]
        if not all(same):
            raise ArgumentError(
                "data differ between two readings of their first batch: an exact fit goes over the "
                "same samples again and again. Use it without random augmentation"
            )
        logits, _ = self.jacobian.outputs(None, inputs[:4])
        self._mean = MeanOfSamples(self.loss, logits, targets)
        tries = [(logits, targets[:4])]
        for start in range(0, len(self._mean.classes), 64):
            some = self._mean.classes[start : start + 64]
            tries.append((made_up(logits, len(some)), some))
        for few in tries:
            check_convex(self.loss, *few)
        return all([is_quadratic(self.loss, *few) for few in tries])


def in_order(data: Data, batch_size: int) -> DataLoader:
    """Give a loader that yields every sample, in the data set's own order.

    Raises:
        ArgumentError: as `as_loader`; or a data set that is a stream.
    """
    loader = as_loader(data, batch_size, shuffle=False)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ArgumentError(
            "data must be a Dataset with indices, or a DataLoader of one that makes batches: "
            "the samples are read in order, many times"
        )
    return _loader(loader.dataset, loader.batch_size or batch_size, loader)


def check_l2(l2: float) -> None:
    """Raise ArgumentError unless l2 is positive: the objective is then strongly convex."""
    if not (math.isfinite(l2) and l2 > 0):
        raise ArgumentError(
            f"l2 must be positive and finite, got {l2}: without it the optimum is not unique, and "
            "no bound holds"
        )


def check_tangent(tangent: object) -> None:
    """Raise ArgumentError unless it is a LinearizedModel."""
    if not isinstance(tangent, LinearizedModel):
        raise ArgumentError(
            f"tangent must be a LinearizedModel, got a {type(tangent).__name__}: "
            "pass it through tangent_ops.linearize first"
        )


def _loader(dataset, batch_size: int, like: DataLoader) -> DataLoader:
    # Its own generator keeps the loader from drawing a worker seed from the caller's.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        generator=torch.Generator(),
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
