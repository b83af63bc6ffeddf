"""`statistics`: the sums that determine a square-loss fit, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tangent_ops.composition.fixed_terms import add_samples
from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.composition.statistics import FRACTION_BITS, StatisticsMeta, TangentStatistics
from tangent_ops.data import Data, check_integer, check_positive, in_order, place, unpack
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.problem import check_tangent
from tangent_ops.exact.progress import progress_bar
from tangent_ops.exact.tangent_features import TangentFeatures
from tangent_ops.fields import Inputs
from tangent_ops.losses import Loss, RescaledSquareLoss, loss_name
from tangent_ops.model.core_basis import sample_sha256
from tangent_ops.model.linearized import LinearizedModel

READ = 64  # samples that are in memory at a time


def statistics(
    tangent: LinearizedModel,
    data: Data,
    *,
    loss: Loss | None = None,
    classes: Sequence[str] | None = None,
    class_weights: Sequence[float] | None = None,
    fraction_bits: int = FRACTION_BITS,
    remembered: bool = False,
    batch_size: int = READ,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> TangentStatistics:
    """The statistics of some samples; one pass over them, in memory that grows by 16 bytes each.

    A sample's terms are the same bits whatever other samples there are (on one machine, device,
    number of threads and release of torch).

    Args:
        tangent: the model, best with a core (`core_basis`); its deltas are not read.
        data: a Dataset of (input, target), or a DataLoader; read in order.
        loss: `RescaledSquareLoss()` (None), with k = 1, or `torch.nn.MSELoss()`.
        classes: their names, which statistics then must share to be added.
        class_weights: of the loss of each class's samples, (C,), positive.
        fraction_bits: terms are multiples of 2^-fraction_bits; their sums over all samples that
            will ever be added must stay below 2^(63 - fraction_bits).
        remembered: accept samples that the model's basis was computed from. It keeps what it knows
            of them when they are taken out of the statistics.
        batch_size: of a Dataset; a DataLoader has its own.
        device: the model is moved there first.
        progress: show a bar if it takes more than two seconds.

    Raises:
        ArgumentError: an argument is not as above; a sample that the basis remembers; or the model
            has too many core columns.
        UnsupportedError: another loss; a model that mixes samples.
        StatisticsError: features are not finite, or the sums are out of range.
    """
    check_tangent(tangent)
    check_integer("fraction_bits", fraction_bits, 1)
    loss = RescaledSquareLoss() if loss is None else loss
    targets_of = SquareTargets(loss)
    total = weights = None
    for features, inputs, targets, rows in _read(tangent, data, batch_size, device, progress):
        if total is None:
            given = (classes, class_weights, fraction_bits)
            meta = _meta(tangent, features, rows.outputs.shape[1], loss, *given)
            total = TangentStatistics.zero(meta, labelled=targets_of.are_classes)
            weights = None if class_weights is None else torch.tensor(meta.class_weights)
        if not remembered:
            _check_remembered(tangent, inputs, len(total))
        residuals = targets_of.values(targets, rows.outputs) - rows.outputs
        labels = targets.cpu() if targets_of.are_classes else None
        own = None if weights is None or labels is None else weights[labels]
        add_samples(total, rows, residuals, labels, own)
    assert total is not None
    total.sort_list()
    return total


def feature_rows(
    tangent: LinearizedModel,
    data: Data,
    *,
    loss: Loss | None = None,
    batch_size: int = READ,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[FeatureRows, Tensor]:
    """f, φ and a of samples, and their r, (N, C): for what needs the samples, not their sums.

    `Ridge.leave_one_out`, `Ridge.covariance` and `Ridge.predictions` take them. The arguments are
    those of `statistics`; all N C k numbers are kept in memory.

    Raises:
        ArgumentError, UnsupportedError: as `statistics`.
    """
    check_tangent(tangent)
    targets_of = SquareTargets(RescaledSquareLoss() if loss is None else loss)
    parts, residuals = [], []
    for _, _, targets, rows in _read(tangent, data, batch_size, device, progress):
        parts.append(rows)
        residuals.append(targets_of.values(targets, rows.outputs) - rows.outputs)
    return FeatureRows.joined(parts), torch.cat(residuals)


def _read(
    tangent: LinearizedModel,
    data: Data,
    batch_size: int,
    device: str | torch.device | None,
    progress: bool,
) -> Iterator[tuple[TangentFeatures, Inputs, Tensor, FeatureRows]]:
    """Features, inputs, targets and rows of each batch."""
    loader = in_order(data, batch_size)
    where = place(tangent, device)
    features = None
    with progress_bar("statistics", "batch", len(loader), progress) as bar:
        for batch in loader:
            inputs, targets = unpack(batch, where)
            features = features or TangentFeatures(tangent, inputs)
            yield features, inputs, targets, features(inputs)
            bar.update()


def _check_remembered(tangent: LinearizedModel, inputs: Inputs, first: int) -> None:
    known = tangent.basis_remembers
    for index, one in enumerate(inputs if known else ()):
        if sample_sha256(one) in known:
            raise ArgumentError(
                f"data[{first + index}] is among the data that the model's basis was computed "
                "from, and the basis would remember it: leave it out, compute the basis from "
                "other, public data, or pass remembered=True"
            )


class SquareTargets:
    """What a square loss compares outputs with.

    Attributes:
        are_classes: whether targets are class indices.
    """

    def __init__(self, loss: object) -> None:
        self.are_classes = isinstance(loss, RescaledSquareLoss)
        known = self.are_classes or isinstance(loss, nn.MSELoss)
        if not known or loss.reduction != "mean" or getattr(loss, "k", 1) != 1:  # type: ignore
            raise UnsupportedError(
                f"loss is {loss_name(loss)}: statistics are for RescaledSquareLoss(k=1), or "
                "torch.nn.MSELoss(), with reduction='mean'. Other losses need H of its own for "
                "every output, or change with Δ: use fit_exact or fit"
            )
        self._loss = loss

    def values(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """y, (n, C), in the outputs' dtype."""
        if isinstance(self._loss, RescaledSquareLoss):
            self._loss(outputs, targets)  # checks shapes, dtypes and indices
            empty = torch.zeros_like(outputs)
            return empty.scatter_(1, targets[:, None], float(self._loss.M))
        flat = targets.reshape(len(targets), -1)
        if flat.shape != outputs.shape:
            raise ArgumentError(
                f"targets have shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)}: "
                "MSELoss needs a target to each output"
            )
        return flat.to(outputs.dtype)


def _meta(
    tangent: LinearizedModel,
    features: TangentFeatures,
    outputs: int,
    loss: object,
    classes: Sequence[str] | None,
    class_weights: Sequence[float] | None,
    fraction_bits: int,
) -> StatisticsMeta:
    for name, given in (("classes", classes), ("class_weights", class_weights)):
        if given is not None and len(given) != outputs:
            raise ArgumentError(f"{name} has {len(given)} entries, the model {outputs} outputs")
    if class_weights is not None:
        if not isinstance(loss, RescaledSquareLoss):
            raise ArgumentError("class_weights are for targets that are classes")
        check_positive(**{f"class_weights[{i}]": w for i, w in enumerate(class_weights)})
    return StatisticsMeta(
        DeltaMeta(
            tangent.fingerprint,
            tangent.model_name,
            tangent.trainable,
            loss=loss_name(loss),
            rank=tangent.rank,
            basis=tangent.basis_fingerprint,
        ),
        features.layout,
        features.head,
        outputs,
        None if classes is None else tuple(classes),
        None if class_weights is None else tuple(float(weight) for weight in class_weights),
        fraction_bits,
    )
