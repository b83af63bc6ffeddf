"""`Problem`: the model, data, loss and penalty that the exact methods share."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from tangent_ops.checks import check_integer
from tangent_ops.data import Data, in_order, inputs_of, place
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.curvature import ShardCurvature
from tangent_ops.exact.hashed_loader import HashedLoader, sha256_of
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import Layout
from tangent_ops.exact.passes import Passes, subset
from tangent_ops.exact.representation import Representation
from tangent_ops.fields import Inputs, call
from tangent_ops.losses import Loss, RescaledSquareLoss, loss_name
from tangent_ops.model.features import Trunk, cache_features
from tangent_ops.model.linearized import LinearizedModel

Cache = bool | str | os.PathLike[str]


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Problem:
    """min F(Δ) = (1/N) Σ_i loss(f(x_i) + J(x_i) Δ, y_i) + l2/2 ‖Δ‖², over the data x_i, y_i.

    Built once, and passed to `fit_exact`, `certify`, `Influence`, `leave_one_out`,
    `first_order_scores`, `predictive_covariance`, `forget_samples` and `add_samples`.

    With `cache`, the constructor reads the data and runs the frozen part of the model over them,
    once. Without it, every pass reads the data again. The model's deltas are no part of the
    problem: each call reads them, and no residual or gradient is kept between two calls.

    Args:
        tangent: the model. Only `fit_exact` and what is built on it change its deltas.
        data: a Dataset of (input, target), or of dicts with "labels", or a DataLoader; all samples
            are read, in the data set's own order. Without random augmentation.
        l2: the penalty's weight, positive.
        loss: a mean over the batch of each sample's own loss, convex in the logits; None for
            `RescaledSquareLoss()`. The constructor checks it on up to 1,024 classes, the first pass
            on other targets.
        batch_size: of a Dataset; a DataLoader has its own.
        cache: True keeps the inputs of the first trained block in memory; a path keeps them in a
            file in that folder.
        device: the model is moved there first.
        representation: how iterative methods compute products with J. "passes": by passes through
            the model. "factors": from each layer's inputs and output cotangents, which are computed
            once, by C backward passes, when they are first needed; products then need no pass, and
            J Jᵀ no gradient. "rows": from the rows of J. "auto": factors, if they cost fewer
            operations and fit into 2 GiB, or into 64 GiB on disk; else passes.
        factors_dtype: factors and rows are kept in that precision, such as torch.float16; None for
            the deltas' own. With a path as `cache` they are kept in that folder, too.
        progress: show progress bars, here and in all functions that take the problem.

    Attributes:
        tangent: the model.

    Raises:
        ArgumentError: an invalid argument; a loss that is not convex, or not the mean of the
            samples' own losses (with class weights or ignored targets it is not); data that are
            empty, a stream, or differ between two readings of the first batch.
        UnsupportedError: cache, for a model that cannot be split; factors or rows, when they are
            first needed, for a model that mixes samples.
    """

    tangent: LinearizedModel
    _passes: Passes
    _source: DataLoader
    _trunk: Trunk | None
    _digests: tuple[bytes, ...] | None  # of the samples that were cached
    _anchor: str | None  # fingerprint of the anchor whose features were cached
    _representation: Representation

    def __init__(
        self,
        tangent: LinearizedModel,
        data: Data,
        l2: float,
        *,
        loss: Loss | None = None,
        batch_size: int = 64,
        cache: Cache = False,
        device: str | torch.device | None = None,
        representation: str = "auto",
        factors_dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        check_tangent(tangent)
        check_l2(l2)
        if loss is not None and not callable(loss):
            raise ArgumentError(
                f"loss must be a function of logits and targets, got a {type(loss).__name__}"
            )
        folder = None if isinstance(cache, bool) else Path(cache)
        kept = Representation(representation, folder, factors_dtype)
        source = in_order(data, batch_size)
        place(tangent, device)
        loss = RescaledSquareLoss() if loss is None else loss
        passes = Passes(Jacobian(tangent), source, l2, loss, progress)
        trunk = digests = anchor = None
        if cache is not False:
            anchor, reading = tangent.fingerprint, HashedLoader(source)
            trunk, tail, loader = cached(tangent, reading, cache, progress)
            passes = passes.changed(jacobian=Jacobian(tail), loader=loader)
            digests = tuple(reading.digests)
        vars(self).update(
            tangent=tangent,
            _passes=passes,
            _source=source,
            _trunk=trunk,
            _digests=digests,
            _anchor=anchor,
            _representation=kept,
        )

    @property
    def passes(self) -> Passes:
        """Passes over the data, for the other modules of this package.

        Raises:
            ArgumentError: the model has been moved, cast or loaded since the problem was built.
        """
        moved = Layout.of(self.tangent) != self._passes.layout
        computed = {self._anchor, self._representation.anchor} - {None}
        if moved or (computed and computed != {self.tangent.fingerprint}):
            raise ArgumentError(
                "tangent was moved, cast or loaded after this Problem was built: build a new one"
            )
        return self._passes

    @property
    def system(self) -> Passes:
        """The same objective with J in its representation, for the iterative methods."""
        return self._representation.system(self.passes)

    @property
    def computed_in_double(self) -> Passes | None:
        """`system`, if its factors or rows have been computed and kept in float64."""
        kept, passes = self._representation, self.passes
        exact = kept.dtype is None and passes.layout.dtype == torch.float64
        return kept.system(passes) if exact and kept.batches is not None else None

    @property
    def in_16_bits(self) -> bool:
        """Whether J is kept in fewer bits than the deltas have."""
        return self.representation != "passes" and self._representation.dtype in (
            torch.float16,
            torch.bfloat16,
        )

    @property
    def representation(self) -> str:
        """How `system` computes products with J: "passes", "factors" or "rows"."""
        return self._representation.choose(self.passes)

    @property
    def l2(self) -> float:
        """The penalty's weight."""
        return self._passes.l2

    @property
    def loss(self) -> Loss:
        """The loss of logits and targets."""
        return self._passes.loss

    @property
    def quadratic(self) -> bool:
        """Whether the loss is quadratic in the logits."""
        return self._passes.quadratic

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return self._passes.samples

    @property
    def outputs(self) -> int:
        """C, the number of the model's outputs to a sample."""
        return self._passes.outputs

    @property
    def parameters(self) -> int:
        """P, the number of entries of a delta."""
        return self._passes.layout.size

    @property
    def cached(self) -> bool:
        """Whether the inputs of the first trained block are kept."""
        return self._trunk is not None

    @property
    def data_sha256(self) -> str:
        """SHA-256 over the SHA-256 of each sample's input and target, in order.

        With a cache it is of the data as they were cached; without, the data are read.
        """
        return self.read_sha256() if self._digests is None else sha256_of(self._digests)

    def read_sha256(self) -> str:
        """As `data_sha256`, but the data are always read again."""
        reading = HashedLoader(self._source)
        for _ in reading:
            pass
        return sha256_of(reading.digests)

    def without(self, ids: Sequence[int]) -> Problem:
        """The same problem without some of the samples; nothing is read or computed again.

        Args:
            ids: the samples' indices in the data set.

        Raises:
            ArgumentError: an id that is no index; no id; no sample is left.
        """
        gone = self.check_ids(ids)
        if len(gone) == self.samples:
            raise ArgumentError(
                f"ids has all {self.samples} samples of data: nothing is left without them"
            )
        kept = [index for index in range(self.samples) if index not in gone]
        digests = self._digests
        return self._changed(
            _passes=self.passes.take(kept),
            _source=subset(self._source, kept),
            _digests=None if digests is None else tuple(digests[index] for index in kept),
            _representation=self._representation.take(kept),
        )

    def plus(self, data: Dataset[Any]) -> Problem:
        """The same problem with new samples after its own; only the new ones are read.

        Args:
            data: the new samples; they are batched and collated as the problem's own.

        Raises:
            ArgumentError: as in `Problem`; a DataLoader.
        """
        if isinstance(data, DataLoader):
            raise ArgumentError("data must be a Dataset of new samples, got a DataLoader")
        added = in_order(self._source, 1, in_order(data, 1).dataset)
        passes = self.passes
        more = Passes(Jacobian(self.tangent), added, self.l2, self.loss, passes.progress)
        entering, digests = added.dataset, self._digests
        if self._trunk is not None and digests is not None:
            reading = HashedLoader(added)
            entering = cache_features(self._trunk, reading, progress=more.progress)
            digests = (*digests, *reading.digests)
        loader = passes.loader
        assert isinstance(loader, DataLoader)
        alone = passes.changed(
            loader=in_order(loader, 1, entering), samples=more.samples, _read_once=False
        )
        return self._changed(
            _representation=self._representation.joined(alone),
            _passes=passes.changed(
                loader=_joined(loader, entering),
                samples=self.samples + more.samples,
                quadratic=self.quadratic and more.quadratic,
                _read_once=False,
            ),
            _source=_joined(self._source, added.dataset),
            _digests=digests,
        )

    def with_l2(self, l2: float) -> Problem:
        """The same problem with another weight of the penalty; nothing is computed again.

        Raises:
            ArgumentError: l2 is not positive.
        """
        check_l2(l2)
        return self._changed(_passes=self.passes.changed(l2=float(l2)))

    def curvature(self) -> ShardCurvature:
        """Products with the Hessian, as `compose_lossless` and `forget_without_data` take them.

        Raises:
            UnsupportedError: the loss is not quadratic.
        """
        return ShardCurvature(self)

    def check_ids(self, ids: Sequence[int]) -> set[int]:
        """Give the ids as a set; raise ArgumentError if there is none, or one is not an index."""
        for index in ids:
            check_integer("each id", index, 0)
            if index >= self.samples:
                raise ArgumentError(
                    f"id {index} is out of range: data has {self.samples} samples, 0 to "
                    f"{self.samples - 1}"
                )
        if not len(ids):
            raise ArgumentError("ids is empty: name at least one sample")
        return set(ids)

    def flat(self, delta: Mapping[str, Tensor] | None = None) -> Tensor:
        """A delta, or the model's present one, as a new vector.

        Raises:
            DeltaError: the delta does not fit the model.
        """
        return self.passes.layout.flat(self.tangent.deltas() if delta is None else delta)

    def entering(self, inputs: Inputs | Mapping[str, Tensor]) -> Inputs:
        """The inputs as `passes` takes them: through the frozen part if its outputs are cached."""
        fields = inputs_of(inputs) if isinstance(inputs, Mapping) else inputs
        inputs = fields.to(self.passes.layout.device)
        return inputs if self._trunk is None else call(self._trunk, inputs)

    def present(self, inputs: Inputs | Mapping[str, Tensor]) -> Any:
        """The inputs as `system` takes them."""
        found = self.entering(inputs)
        return found if self.representation == "passes" else self._representation.present(found)

    def __repr__(self) -> str:
        kind = "quadratic" if self.quadratic else "not quadratic"
        return (
            "Problem(\n"
            f"  samples: {self.samples:,}\n"
            f"  outputs: {self.outputs:,}\n"
            f"  parameters: {self.parameters:,}\n"
            f"  l2: {self.l2:g}\n"
            f"  loss: {loss_name(self.loss).splitlines()[0]}, {kind}\n"
            f"  cached: {'yes' if self.cached else 'no'}\n"
            ")"
        )

    def _changed(self, **fields: Any) -> Problem:
        other = copy.copy(self)
        vars(other).update(fields)
        return other


def cached(
    tangent: LinearizedModel, loader: DataLoader | HashedLoader, cache: Cache, progress: bool
) -> tuple[Trunk, LinearizedModel, DataLoader]:
    """Split a model, and run its frozen part over the data once.

    Returns:
        The frozen part, the rest, and a loader of the inputs of the rest.

    Raises:
        UnsupportedError: the model cannot be split.
    """
    trunk, tail = tangent.split()
    folder = None if isinstance(cache, bool) else cache
    features = cache_features(trunk, loader, folder, progress=progress)
    return trunk, tail, in_order(features, loader.batch_size or 1)


def check_l2(l2: float) -> None:
    """Raise ArgumentError unless l2 is positive: the objective is then strongly convex."""
    if not (math.isfinite(l2) and l2 > 0):
        raise ArgumentError(
            f"l2 must be positive and finite, got {l2}: without it the optimum is not unique, and "
            "no bound holds"
        )


def check_problem(problem: object) -> None:
    """Raise ArgumentError unless it is a Problem."""
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a Problem, got a {type(problem).__name__}: build one with "
            "tangent_ops.exact.Problem(tangent, data, l2)"
        )


def check_tolerance(tol: float) -> None:
    """Raise ArgumentError unless the tolerance is between 0 and 1."""
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must be between 0 and 1, got {tol}")


def check_tangent(tangent: object) -> None:
    """Raise ArgumentError unless it is a LinearizedModel."""
    if not isinstance(tangent, LinearizedModel):
        raise ArgumentError(
            f"tangent must be a LinearizedModel, got a {type(tangent).__name__}: "
            "pass it through tangent_ops.linearize first"
        )


def _joined(loader: DataLoader, dataset: Dataset[Any]) -> DataLoader:
    return in_order(loader, 1, ConcatDataset([loader.dataset, dataset]))
