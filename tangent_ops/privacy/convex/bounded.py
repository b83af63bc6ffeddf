"""A convex objective with a bound on the gradient of every possible sample.

The clipped gradient of a sample, for a model with C outputs, is not the gradient of a convex
function. Here the Jacobian is bounded and the residual clipped instead. With

    u_i = min(1, R / ‖J(x_i)‖₂),    t_i = M onehot(y_i),    ρ(r) = ½‖r‖² if ‖r‖ <= B,
                                                                   B(‖r‖ - B/2) else

the loss of a sample is ℓ_i = ρ(u_i (f(x_i) + J(x_i)Δ - t_i)). ρ is convex, ‖∇ρ‖ <= B and
∇²ρ <= I, so ℓ_i is convex in Δ, ‖∇ℓ_i‖ <= u_i ‖J_i‖ B <= R B, and ∇²ℓ_i <= u_i² ‖J_i‖² <= R².
u_i depends on x_i only. Where nothing is clipped and u_i = 1, ℓ_i is `RescaledSquareLoss(k=1)`
times C/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tangent_ops.data import check_positive, unpack_one
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.problem import Cache, check_l2, check_tangent
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.convex.jacobian_norms import batch_norms, entering, norms_bar

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class BoundedSquareLoss(nn.Module):
    """The mean over a batch of ρ(u (f - M onehot(y))), the vector Huber loss, in float64.

    Args:
        B: residual norm above which the loss is linear.
        M: target value of the target class's logit.
    """

    def __init__(self, B: float, M: float) -> None:
        super().__init__()
        self.B = B
        self.M = M

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of logits (n, C) and targets (n, 2), float64: class and u."""
        classes, weights = targets.double().unbind(dim=1)
        wanted = self.M * nn.functional.one_hot(classes.long(), logits.shape[1])
        squares = (weights[:, None] * (logits.double() - wanted)).square().sum(dim=1)
        inside = squares <= self.B**2
        # Inside, the root is of a constant: its derivative at 0 would be infinite.
        size = torch.where(inside, self.B**2, squares).sqrt()
        return torch.where(inside, squares / 2, self.B * (size - self.B / 2)).mean()

    def extra_repr(self) -> str:
        return f"B={self.B:g}, M={self.M:g}"


@dataclass(frozen=True)
class Bounds:
    """Bounds that hold for every possible sample, chosen without the private data; all positive.

    Attributes:
        jacobian: R, bound of ‖u J(x)‖₂, in logits per unit of Δ.
        residual: B, bound of the residual of a sample's logits.
        target: M, the target value of the target class's logit.
        normalizer: E, public: the sum over samples is divided by it. None for the number of
            samples, which is then public.
    """

    jacobian: float
    residual: float
    target: float = 15.0
    normalizer: float | None = None

    def __post_init__(self) -> None:
        check_positive(jacobian=self.jacobian, residual=self.residual, target=self.target)
        if self.normalizer is not None:
            check_positive(normalizer=self.normalizer)

    @property
    def gradient(self) -> float:
        """The bound of ‖∇ℓ_i‖: R B."""
        return self.jacobian * self.residual

    def divisor(self, samples: int) -> float:
        """E."""
        return float(samples if self.normalizer is None else self.normalizer)

    def smoothness(self, l2: float, samples: int) -> float:
        """The Lipschitz constant of ∇F, for F and its neighbours: l2 + (N + 1) R²/E."""
        return l2 + (samples + 1) * self.jacobian * self.jacobian / self.divisor(samples)


class Objective:
    """F(Δ) = (1/E) Σ_i ℓ_i(Δ) + l2/2 ‖Δ‖², of bounded losses.

    `passes` compute F E/N, which has the same minimum: 1/N replaces 1/E, and l2 E/N replaces l2.

    Args:
        tangent: the model; its deltas are neither read nor changed.
        data: of (input, class), in order.
        l2: positive.
        bounds: R, B, M, E.
        cache: as in `fit`.
        device: moves the model there first.
        progress: show bars.

    Attributes:
        model: the tangent model, or its tail if features are cached.
        data: what enters it, with class and u.
        loss: the loss of a batch of `data`.
        samples: N.
        sensitivity: of ∇F, to adding or removing one sample: R B / E.

    Raises:
        ArgumentError: an invalid argument; targets that are no classes; a Jacobian that
            is not finite; data that differ between two readings.
        UnsupportedError: a model in 16 bits; cache, for a model that cannot be split.
    """

    def __init__(
        self,
        tangent: LinearizedModel,
        data: DataLoader,
        l2: float,
        bounds: Bounds,
        *,
        cache: Cache,
        device: str | torch.device | None,
        progress: bool,
    ) -> None:
        check_tangent(tangent)
        check_l2(l2)
        _check_precision(tangent)
        self.model, loader = entering(tangent, data, cache, device, progress)
        self.data = _weighted(loader, _pack(Jacobian(self.model), loader, bounds, progress))
        self.l2 = float(l2)
        self.bounds = bounds
        self.loss = BoundedSquareLoss(bounds.residual, bounds.target)
        self.samples = len(self.data.dataset)  # pyright: ignore[reportArgumentType]
        self.normalizer = bounds.divisor(self.samples)
        l2 = self.l2 * self.normalizer / self.samples
        self.passes = Passes(Jacobian(self.model), self.data, l2, self.loss, progress)
        # `Passes` tried a few samples, whose residuals may all be unclipped.
        self.passes.quadratic = False

    @property
    def sensitivity(self) -> float:
        return self.bounds.gradient / self.normalizer

    def gradient(self, delta: Tensor) -> Tensor:
        """∇F(Δ), flat."""
        _, gradient, _ = self.passes.gradient(delta)
        return gradient.mul_(self.samples / self.normalizer)

    @property
    def assumes(self) -> tuple[str, ...]:
        """What must be true besides a mechanism's own conditions."""
        dtype = str(self.passes.layout.dtype).removeprefix("torch.")
        return (
            "the anchor, a low-rank basis, and every argument (bounds, l2, target, steps, lr) do "
            "not depend on these data",
            f"the number of samples, {self.samples}, and the normalizer, {self.normalizer:g}, are "
            "public",
            "a sample's logits and Jacobian depend on that sample alone, and are the same in every "
            "reading of the data",
            f"arithmetic in {dtype} counts as exact",
            "only the delta is published: no running time, and no error that a sample caused",
        )


def _check_precision(tangent: LinearizedModel) -> None:
    small = {p.dtype for p in tangent.anchor.parameters()} & {torch.float16, torch.bfloat16}
    if small:
        raise UnsupportedError(
            f"the model has parameters in {', '.join(map(str, small))}, whose rounding breaks the "
            "bound on a sample's gradient: use .float() or .double()"
        )


def _pack(jacobian: Jacobian, loader: DataLoader, bounds: Bounds, progress: bool) -> Tensor:
    """Class and u of every sample: (N, 2) float64."""
    slack = _slack(jacobian)
    packed = []
    with norms_bar(loader, progress) as bar:
        for batch in loader:
            inputs, targets = unpack_one(batch, jacobian.device)
            _check_classes(jacobian, inputs, targets)
            norms = batch_norms(jacobian, inputs, bar)
            weights = ((1 - slack) * bounds.jacobian / norms).clamp_max(1.0)
            packed.append(torch.stack([targets.cpu().double(), weights], dim=1))
    return torch.cat(packed)


def _slack(jacobian: Jacobian) -> float:
    """Relative room for rounding between a sample's norm and its part in a pass's gradient."""
    if jacobian.layout.dtype == torch.float64:
        return 1e-12
    # TF32, the default of convolutions on CUDA, rounds by 5e-4.
    return 1e-2 if jacobian.device.type == "cuda" else 1e-4


def _check_classes(jacobian: Jacobian, inputs: Tensor, targets: Tensor) -> None:
    logits, _ = jacobian.outputs(None, inputs[:1])
    if logits.ndim != 2:
        raise ArgumentError(f"the model must give logits (N, C), it gives {tuple(logits.shape)}")
    if targets.ndim != 1 or targets.dtype not in _INTEGERS:
        raise ArgumentError(
            f"targets must be class indices of shape (N,), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ArgumentError(f"targets must be class indices from 0 to {logits.shape[1] - 1}")


class _Weighted(Dataset):
    """A data set's own items, each with its row of class and u."""

    def __init__(self, dataset: Dataset, packed: Tensor) -> None:
        self.dataset = dataset
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.dataset[index], self.packed[index]


@dataclass(frozen=True)
class _Collate:
    """Collates `_Weighted` items: the inputs by `inner`, the data set's own collate_fn."""

    inner: Callable[[list[Any]], Any]

    def __call__(self, items: list[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        inputs, _ = self.inner([item for item, _ in items])
        return inputs, torch.stack([row for _, row in items])


def _weighted(loader: DataLoader, packed: Tensor) -> DataLoader:
    return DataLoader(
        _Weighted(loader.dataset, packed),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),
        generator=torch.Generator(),
    )
