"""`Passes`: a fit's objective, gradient and Hessian products, by passes over the data."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tangent_ops.data import in_order
from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import Layout, dot
from tangent_ops.exact.progress import progress_bar
from tangent_ops.exact.stored import StoredBatches
from tangent_ops.fields import Inputs, each_tensor, same
from tangent_ops.losses import (
    Loss,
    MeanOfSamples,
    check_convex,
    is_quadratic,
    loss_gradient,
    loss_product,
    made_up,
)


class Cotangent(Protocol):
    """Gives the cotangent of a batch's outputs from f, J v, the targets and the batch's number."""

    def __call__(
        self, primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int
    ) -> Tensor: ...


class JacobianLike(Protocol):
    """`Jacobian`, or `StoredJacobian`, each for inputs of its own kind."""

    @property
    def layout(self) -> Layout: ...

    @property
    def device(self) -> torch.device: ...

    def unpack(self, batch: Any) -> tuple[Any, Tensor]: ...

    def outputs(self, delta: Tensor | None, inputs: Any) -> tuple[Tensor, Tensor]: ...

    def pull_back(
        self, direction: Tensor, inputs: Any, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]: ...

    def outputs_many(self, directions: Tensor, inputs: Any) -> tuple[Tensor, Tensor]: ...

    def pull_back_many(
        self, directions: Tensor, inputs: Any, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor: ...

    def rows(self, one: Any) -> Tensor: ...


class Passes:
    """F(Δ) = (1/N) Σ_i loss(f(x_i) + J(x_i) Δ, y_i) + l2/2 ‖Δ‖², by passes over the data.

    A pass gives the gradient, or the Hessian (1/N) Σ J_iᵀ A_i J_i + l2 I times a vector, where A_i
    is the Hessian of the loss by the logits. The Hessian is exact, since the model is linear in Δ.
    Vectors are flat, see `Layout`. Passes read the samples in the data set's own order.

    Args:
        jacobian: of the model.
        loader: of (input, target), as `in_order` gives it.
        l2: positive.
        loss: as in `Problem`, which says on which targets it is checked.
        progress: show bars.

    Attributes:
        samples: N.
        outputs: C, entries of a sample's output.
        quadratic: whether the loss is quadratic in the logits, so that A_i is the same at every Δ.

    Raises:
        ArgumentError: the loss is not convex, or not a mean; data that differ between two readings.
    """

    def __init__(
        self, jacobian: Jacobian, loader: DataLoader, l2: float, loss: Loss, progress: bool
    ) -> None:
        self.jacobian: JacobianLike = jacobian
        self.loader: DataLoader | StoredBatches = loader
        self.l2 = float(l2)
        self.loss = loss
        self.progress = progress
        self.samples: int = _length(loader)
        self._in_double = False
        self._read_once = False
        inputs, targets = self._first_batch()
        logits, _ = jacobian.outputs(None, inputs[:4])
        self.outputs = logits[0].numel()
        self._mean = MeanOfSamples(loss, logits, targets)
        tries = [(logits, targets[:4])]
        for start in range(0, len(self._mean.classes), 64):
            some = self._mean.classes[start : start + 64]
            tries.append((made_up(logits, len(some)), some))
        for few in tries:
            check_convex(loss, *few)
        self.quadratic = all([is_quadratic(loss, *few) for few in tries])

    @property
    def layout(self) -> Layout:
        return self.jacobian.layout

    def changed(self, **attributes: Any) -> Passes:
        """A copy with other attributes, such as l2, or a jacobian and the loader of its inputs."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def in_double(self) -> Passes:
        """The same in float64, with a copy of the model."""
        assert isinstance(self.jacobian, Jacobian)
        return self.changed(jacobian=self.jacobian.in_double(), _in_double=True)

    def take(self, indices: Sequence[int]) -> Passes:
        """The same objective over some of the samples."""
        if isinstance(self.loader, StoredBatches):
            loader = self.loader.take(indices)
        else:
            loader = subset(self.loader, indices)
        return self.changed(loader=loader, samples=len(indices))

    def entering(self, inputs: Inputs) -> Inputs:
        """Inputs on the model's device, in float64 if the model was cast to it."""
        inputs = inputs.to(self.jacobian.device)
        return each_tensor(inputs, _double) if self._in_double else inputs

    def batches(self, what: str | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Batches of inputs and targets, on the model's device; a bar says what they are for."""
        seen = 0
        bar = progress_bar(
            what or "data", "sample", self.samples, self.progress and what is not None
        )
        with bar:
            for batch in self.loader:
                inputs, targets = self.jacobian.unpack(batch)
                if not self._read_once:
                    self._mean.check(targets)
                if self._in_double:
                    inputs, targets = each_tensor(inputs, _double), _double(targets)
                seen += len(inputs)
                yield inputs, targets
                bar.update(len(targets))
        if seen != self.samples:
            raise ArgumentError(f"data has {self.samples} samples, but yielded {seen}")
        self._read_once = True

    def logits(self, delta: Tensor) -> list[Tensor]:
        """f + J Δ of every batch."""
        pairs = (self.jacobian.outputs(delta, inputs) for inputs, _ in self.batches())
        return [primal + tangent for primal, tangent in pairs]

    def tangents(self, direction: Tensor) -> list[Tensor]:
        """J v of every batch."""
        return [self.jacobian.outputs(direction, inputs)[1] for inputs, _ in self.batches()]

    def tangents_many(self, directions: Tensor) -> list[Tensor]:
        """J v of every batch for each row v of (R, P): (R, n, ...) each."""
        return [self.jacobian.outputs_many(directions, inputs)[1] for inputs, _ in self.batches()]

    def gradient(self, delta: Tensor, what: str = "gradient") -> tuple[float, Tensor, list[Tensor]]:
        """F(Δ), its gradient, and the logits of every batch, in one pass.

        `what` is the label of the progress bar.

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

        gradient = self.pull_back(delta, cotangent, what)
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
            penalty: whether l2 I is included.
        """
        return self.products(direction[None], at, penalty=penalty)[0]

    def products(
        self,
        directions: Tensor,
        at: Sequence[Tensor] | None = None,
        *,
        penalty: bool = True,
        without: Sequence[int] | None = None,
    ) -> Tensor:
        """The Hessian times R directions, (R, P), in one pass.

        Args:
            directions: (R, P).
            at: as in `product`.
            penalty: as in `product`.
            without: R indices; direction r is multiplied by the Hessian of the objective over all
                samples but this one.
        """
        samples, seen = self.samples - (without is not None), 0

        def cotangent(primal: Tensor, tangents: Tensor, /, targets: Tensor, number: int) -> Tensor:
            nonlocal seen
            where = primal if at is None else at[number]
            found = [loss_product(self.loss, where, targets, tangent) for tangent in tangents]
            products = len(targets) / samples * torch.stack(found)
            for row, index in enumerate(without or ()):
                if seen <= index < seen + len(targets):
                    products[row, index - seen] = 0
            seen += len(targets)
            return products

        total = torch.zeros_like(directions)
        for number, (inputs, targets) in enumerate(self.batches("product")):
            of_batch = functools.partial(cotangent, targets=targets, number=number)
            total.add_(self.jacobian.pull_back_many(directions, inputs, of_batch))
        return total.add_(directions, alpha=self.l2) if penalty else total

    def pull_back(self, direction: Tensor, cotangent: Cotangent, what: str | None = None) -> Tensor:
        """Σ_b J_bᵀ cotangent(f_b, J_b v, y_b, b): one jvp and one vjp over the data."""
        total = self.layout.zeros()
        sums = self.layout.views(total)
        for number, (inputs, targets) in enumerate(self.batches(what)):
            of_batch = functools.partial(cotangent, targets=targets, number=number)
            parts = self.jacobian.pull_back(direction, inputs, of_batch)
            for part, added in zip(sums, parts, strict=True):
                part.add_(added)
        return total

    def _first_batch(self) -> tuple[Inputs, Tensor]:
        readings = [next(iter(self.loader)) for _ in range(2)]
        first, again = map(self.jacobian.unpack, readings)
        if not all(same(a, b) for a, b in zip(first, again, strict=True)):
            raise ArgumentError(
                "data differ between two readings of their first batch: an exact fit reads the "
                "same samples many times. Pass them without random augmentation"
            )
        return first


def subset(loader: DataLoader, indices: Sequence[int]) -> DataLoader:
    """A loader of some of the samples, with the same batch size and collation."""
    return in_order(loader, 1, Subset(loader.dataset, indices))


def _length(loader: DataLoader) -> int:
    return len(loader.dataset)  # pyright: ignore[reportArgumentType]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
