"""`private_samples`: the checks and the reading that both private regressions begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.data import Data, in_order
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model, check_start
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.regression.coordinates import PublicCoordinates
from tangent_ops.privacy.regression.samples import SampleReader

ASSUMES = (
    "the anchor, its head included, the core's basis, the coordinates and the preprocessing do not "
    "depend on these samples",
    "every option (bounds, clips, shares, steps, lr, l2) does not depend on these samples; "
    "choosing them by trials costs more",
    "each person has one sample; with k samples the guarantee is weaker (group privacy)",
    "the number of samples is public",
    "a sample's features depend on that sample alone, and float64 counts as exact",
)


@dataclass(frozen=True)
class PrivateSamples:
    """Private samples, ready to be read.

    Attributes:
        count: N.
        before: the phases in which the deltas were trained on these samples.
    """

    count: int
    before: tuple[Phase, ...]
    reader: SampleReader
    coordinates: PublicCoordinates

    def __iter__(self) -> Iterator[tuple[FeatureRows, Tensor]]:
        """Batches of features in the coordinates, and of residuals."""
        for rows, residuals in self.reader:
            yield self.coordinates.of(rows), residuals


def private_samples(
    tangent: LinearizedModel,
    data: Data,
    privacy: Privacy,
    coordinates: PublicCoordinates,
    *,
    loss: Loss | None,
    batch_size: int,
    device: str | torch.device | None,
    progress: bool,
) -> PrivateSamples:
    """Check a model, a data set and a guarantee.

    Raises:
        ArgumentError: coordinates of another model; delta is 1/N or more; the deltas are not zero
            and start is "zero"; a sample is in the data twice, by index or by content.
        UnsupportedError: preprocessing fitted to data; a batch norm that uses its batch.
    """
    check_model(tangent)
    coordinates.check(tangent)
    loader = in_order(data, batch_size)
    count = check_dataset(loader.dataset, privacy.public_preprocessing)
    privacy.check_failure(count)
    before = check_start(tangent, privacy.start)
    check_contents(loader)
    reader = SampleReader(tangent, loader, loss, device, progress)
    return PrivateSamples(count, before, reader, coordinates)


def shrunk(values: Tensor, bound: float) -> Tensor:
    """Each sample (n, ...) scaled down to a Euclidean norm of `bound` if its norm is larger."""
    flat = values.flatten(1)
    largest = flat.abs().amax(1).clamp_min(torch.finfo(values.dtype).tiny)
    # A norm of entries near float64's largest would overflow.
    norms = (flat / largest[:, None]).norm(dim=1) * (1 + 1e-12)
    factors = (bound / norms / largest).clamp_max(1.0)
    return values * factors.reshape(-1, *(1,) * (values.ndim - 1))


def check_bound(name: str, value: float | None, columns: int) -> float:
    """The bound, or 0 for a part without columns; ArgumentError if it is missing."""
    if columns and value is None:
        raise ArgumentError(f"{name} is None, but the coordinates have {columns} of its directions")
    return float(value) if columns and value is not None else 0.0
