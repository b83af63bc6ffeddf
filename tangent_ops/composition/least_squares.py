"""`LeastSquaresWeights`: weights of a composition that fit validation data best."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, unpack
from tangent_ops.delta import (
    DeltaLike,
    check_anchor,
    check_kind,
    check_layout,
    check_several,
    check_values,
    open_delta,
)
from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.family import logits_pair
from tangent_ops.fields import Inputs
from tangent_ops.losses import (
    Loss,
    MeanOfSamples,
    RescaledSquareLoss,
    at_least_single,
    is_quadratic,
    loss_gradient,
    loss_product,
)
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call


class LeastSquaresWeights:
    """Least-squares weights of K deltas, or of any subset of them, on validation data.

    For f0 the anchor's outputs and F_k = J delta_k (N, C), the weights are

        argmin over α of mean loss(f0 + sum_k α_k F_k) + ridge/2 ‖α‖²
            = (FᵀAF + ridge I)⁻¹ (-Fᵀg)

    with g and A the gradient and Hessian of the mean loss by the outputs, at f0. The constructor
    reads the data once, with one Jacobian-vector product per delta and sample. The object keeps
    FᵀAF and -Fᵀg only; each entry depends only on the deltas of its row and column.

    To forget a shard, solve again with `weights(keep=...)`, which needs no data: weights that were
    fitted with the shard's delta depend on it. This object still holds the delta's row; build a new
    one without that delta before you share it.

    Args:
        deltas: of the tangent model's anchor (and basis), or paths of files, which are opened one
            after the other, once to check them and once for every batch.
        tangent: the tangent model. Its own deltas are neither used nor changed.
        data: validation data: a Dataset of (input, target), or a DataLoader.
        loss: (logits, targets) -> scalar mean over the batch, quadratic and convex in the logits;
            None for `RescaledSquareLoss()`.
        ridge: pulls the weights to zero; 0 for plain least squares, which needs deltas with
            linearly independent F_k. None for the smallest ridge that rounding permits: the machine
            epsilon of the outputs' dtype (at least 1e-12) times the mean diagonal entry of FᵀAF
            over the deltas that are kept. Copies of a delta then share its weight.
        batch_size: for a Dataset; a DataLoader has its own.
        progress: show a bar if it takes more than two seconds.

    Attributes:
        matrix: FᵀAF, (K, K), float64, on the CPU.
        vector: -Fᵀg, (K,), float64, on the CPU.
        ridge: as given.

    Raises:
        ArgumentError: no deltas, an item that is not a delta, data that is empty or does not yield
            (input, target), a ridge that is negative or not finite, a model that does not return
            one tensor, or a loss that is not a mean over the samples, not quadratic or not convex.
        DeltaError: a delta of another anchor, rank, basis, names or shapes than the tangent model's
            own; values that are not finite.
        DeltaFileError: a file is truncated, was edited or is not a delta file.
        NonFiniteLossError: outputs are NaN or infinite.
    """

    def __init__(
        self,
        deltas: Iterable[DeltaLike],
        tangent: LinearizedModel,
        data: Data,
        *,
        loss: Loss | None = None,
        ridge: float | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> None:
        check_several(deltas)
        if not isinstance(tangent, LinearizedModel):
            kind = type(tangent).__name__
            raise ArgumentError(f"tangent must be a LinearizedModel, got a {kind}: linearize it")
        if ridge is not None and not (
            isinstance(ridge, numbers.Real) and math.isfinite(ridge) and ridge >= 0
        ):
            raise ArgumentError(f"ridge must be finite and not negative, or None, got {ridge!r}")
        loader = as_loader(data, batch_size, shuffle=False)
        columns = _Columns(tangent, list(deltas))
        loss = loss or RescaledSquareLoss()

        self.ridge = ridge
        bar = tqdm(
            total=len(loader) * columns.count,
            desc="least squares",
            unit="jvp",
            delay=2,
            leave=False,
            disable=not progress,
        )
        with bar, torch.inference_mode(False), torch.no_grad():
            self._read(columns, loader, loss, bar)
        _check_convex(loss, self.matrix)

    def weights(self, keep: Sequence[int] | None = None) -> list[float]:
        """Solve for the weights of all deltas, or of a subset as if there were no others.

        Args:
            keep: positions, in the list of deltas, of those that are kept; None for all.

        Returns:
            One weight per kept delta, in the order of `keep`, for :func:`compose`.

        Raises:
            ArgumentError: keep is empty or not a list of distinct positions; or the ridge is too
                small for unique weights, and the message names the deltas.
        """
        kept = self._positions(keep)
        matrix, vector = self.matrix[kept][:, kept], self.vector[kept]
        least = self._rounding * float(matrix.diagonal().mean())
        ridge = least if self.ridge is None else self.ridge
        matrix.diagonal().add_(ridge)

        # Scaled to a unit diagonal, so that small deltas among large ones do not look dependent.
        scale = torch.where(matrix.diagonal() > 0, matrix.diagonal().rsqrt(), 1.0)
        values, vectors = torch.linalg.eigh(scale[:, None] * matrix * scale)
        flat = values <= (self._rounding if ridge < least else 0.0)
        if flat.any():
            taking_part = vectors[:, flat].square().sum(dim=1) > 1e-6
            which = [k for k, part in zip(kept, taking_part.tolist(), strict=True) if part]
            raise ArgumentError(
                f"the weights of deltas {which} are not unique: on these data their effects on the "
                "outputs are zero or linearly dependent. Leave some out, or pass a larger "
                "ridge (None for the smallest that is enough)"
            )
        return (scale * (vectors @ ((scale * vector) @ vectors / values))).tolist()

    def _read(self, columns: _Columns, loader: DataLoader, loss: Loss, bar: tqdm) -> None:
        """Average FᵀAF and -Fᵀg over the batches, weighted by their numbers of samples."""
        self.matrix = torch.zeros(columns.count, columns.count, dtype=torch.float64)
        self.vector = torch.zeros(columns.count, dtype=torch.float64)
        self._rounding = 1e-12  # relative to the matrix
        samples = 0
        device = next(columns.parameters()).device
        for batch in loader:
            inputs, targets = unpack(batch, device)
            outputs, effects = columns.of(inputs, bar)
            self._rounding = max(self._rounding, torch.finfo(outputs.dtype).eps)
            outputs, effects = at_least_single(outputs), [*map(at_least_single, effects)]
            if samples == 0:
                _check_quadratic(loss, outputs, targets)
                mean = MeanOfSamples(loss, outputs, targets)
            mean.check(targets)
            _, gradient = loss_gradient(loss, outputs, targets)
            products = [loss_product(loss, outputs, targets, effect) for effect in effects]
            rows = torch.stack([effect.flatten() for effect in effects]).double()
            curved = torch.stack([product.flatten() for product in products]).double()
            self.matrix += len(inputs) * (rows @ curved.T).cpu()
            self.vector -= len(inputs) * (rows @ gradient.flatten().double()).cpu()
            samples += len(inputs)
        if samples == 0:
            raise ArgumentError("data has a length, but yielded no batch")
        self.matrix = (self.matrix + self.matrix.T) / (2 * samples)
        self.vector /= samples

    def _positions(self, keep: Sequence[int] | None) -> list[int]:
        count = len(self.vector)
        kept = list(range(count) if keep is None else keep)
        right = [isinstance(k, numbers.Integral) and not isinstance(k, bool) for k in kept]
        if not all(right) or len(set(kept)) < len(kept) or not set(kept) <= {*range(count)}:
            raise ArgumentError(
                f"keep must be distinct positions from 0 to {count - 1}, got {keep!r}"
            )
        if not kept:
            raise ArgumentError("keep is empty: there is nothing to compose")
        return kept


class _Columns(nn.Module):
    """The columns F_k: runs the tangent model with each delta in place of its own."""

    def __init__(self, tangent: LinearizedModel, deltas: list[DeltaLike]) -> None:
        super().__init__()
        if not deltas:
            raise ArgumentError("deltas is empty: there is nothing to compose")
        self.tangent = tangent
        self.deltas = deltas
        self.count = len(deltas)
        for index in range(self.count):
            self._open(index)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return logits_pair(self.tangent, inputs)

    def of(self, inputs: Inputs, bar: tqdm) -> tuple[Tensor, list[Tensor]]:
        """The anchor's outputs (n, ...), and for each delta J delta, of the same shape."""
        outputs, effects = torch.empty(0), []
        for index in range(self.count):
            outputs, effect = functional_call(self, self._open(index), (inputs,))
            if not isinstance(outputs, Tensor):
                kind = type(outputs).__name__
                raise ArgumentError(
                    f"least squares need a model that returns one output tensor, got a {kind}: "
                    "wrap the model in a module that returns its logits"
                )
            if not (outputs.isfinite().all() and effect.isfinite().all()):
                raise NonFiniteLossError(
                    f"the outputs with delta {index} are not finite: check the inputs for NaN"
                )
            effects.append(effect)
            bar.update()
        return outputs, effects

    def _open(self, index: int) -> dict[str, Tensor]:
        """The delta, checked, under the names of this module's own parameters."""
        tangent, own = self.tangent, self.tangent.deltas()
        delta, what = open_delta(self.deltas[index], index)
        meta = getattr(delta, "meta", None)
        check_anchor(meta, tangent.fingerprint, tangent.model_name, what)
        check_kind(meta, tangent.rank, tangent.basis_fingerprint, what)
        check_values(delta, what)
        check_layout(delta, own, what)
        return {f"tangent.delta.{name}": delta[name].detach().to(p) for name, p in own.items()}


def _check_quadratic(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    if not is_quadratic(loss, outputs, targets):
        raise ArgumentError(
            f"loss must be quadratic in the logits, {_name(loss)} is not: use "
            "losses.RescaledSquareLoss() or torch.nn.MSELoss(), even for deltas that were "
            "trained with another loss"
        )


def _check_convex(loss: Loss, matrix: Tensor) -> None:
    curvature = torch.linalg.eigvalsh(matrix)
    if curvature[0] < -1e-5 * curvature.abs().max():  # more than float32 rounds
        raise ArgumentError(
            f"loss must be convex in the logits, {_name(loss)} is not, so it has no minimum: use "
            "losses.RescaledSquareLoss() or torch.nn.MSELoss()"
        )


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
