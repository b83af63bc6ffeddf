"""`with_public`: a shard's data with public images, so that the mean of shards' fits loses less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from tangent_ops.data import LABELS, in_order, place, unpack
from tangent_ops.errors import ArgumentError
from tangent_ops.evaluate import evaluating
from tangent_ops.family import logits_of
from tangent_ops.losses import Loss, RescaledSquareLoss, at_least_single
from tangent_ops.model.linearized import LinearizedModel


class Retargeted(Dataset[Any]):
    """Samples with other targets.

    Args:
        data: of (input, target), or of dicts with "labels".
        targets: (N, C).
    """

    def __init__(self, data: Dataset[Any], targets: Tensor) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        if isinstance(sample, Mapping):
            kept = {name: value for name, value in sample.items() if name not in LABELS}
            return {**kept, LABELS[0]: self.targets[index]}
        return sample[0], self.targets[index]


def with_public(
    tangent: LinearizedModel,
    shard: Dataset[Any],
    public: Dataset[Any],
    *,
    loss: Loss | None = None,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Retargeted:
    """A shard's samples and public ones, whose targets make means of shards' fits better.

    A mean of fits takes each shard's curvature for that of all shards, which is wrong for small
    shards, and for shards of different classes. Here public samples, the same for all shards, take
    part in the curvature alone: with n samples of the shard, p public ones, and
    r_i = y_i - f(x_i), an exact fit of what is returned, with ``torch.nn.MSELoss()``, minimises

        (1/C) [ -(2/n) Σ_shard r_iᵀ J_i Δ + 1/(n+p) Σ_shard and public ‖J_i Δ‖² ] + l2/2 ‖Δ‖²

    whose gradient at Δ = 0 is that of the shard alone, and whose Hessian is the mean over both. So
    the targets are f(x_i) + r_i (n+p)/n in the shard, and f(x_i) for public samples. A delta
    depends on no other shard: it is forgotten as any other. The fit is one step of Newton's method
    with a Hessian that is not the shard's own, so a single shard's delta is not the optimum of its
    own loss. GIANT (Wang et al., NeurIPS 2018) averages such steps with the shards' own Hessians.

    Args:
        tangent: the model; its present deltas are of no account.
        shard: a Dataset of (input, target), or of dicts with "labels"; targets are class indices.
            Without random augmentation: f is computed once.
        public: samples that are like those of all shards; the same for every shard. Their labels
            are read, but not used.
        loss: what the shard would be fitted with: a `RescaledSquareLoss` with k = 1; None for
            `RescaledSquareLoss()`.
        batch_size: of the passes that compute f, one over all samples.
        device: the model is moved there first.
        progress: show a progress bar after two seconds.

    Returns:
        A Dataset of the shard's samples and then the public ones, with targets (C,) in the logits'
        dtype, at least float32: for ``Problem(tangent, ..., l2, loss=torch.nn.MSELoss())``, or for
        `fit` with that loss.

    Raises:
        ArgumentError: another loss; a DataLoader, a stream, an empty data set, or one that yields
            something else; targets that are no class indices of the model's logits.
    """
    loss = RescaledSquareLoss() if loss is None else loss
    if not isinstance(loss, RescaledSquareLoss) or loss.k != 1:
        raise ArgumentError(
            f"loss must be a RescaledSquareLoss with k = 1, got {loss!r}: only with a square loss "
            "do targets alone change the curvature"
        )
    for name, data in (("shard", shard), ("public", public)):
        if isinstance(data, DataLoader):
            raise ArgumentError(f"{name} must be a Dataset, got a DataLoader: give its dataset")
    device = place(tangent, device)
    found = [
        _outputs(tangent, in_order(data, batch_size), loss.M, device, progress)
        for data in (shard, public)
    ]
    (logits, wanted), (others, _) = found
    scale = (len(logits) + len(others)) / len(logits)
    targets = torch.cat([logits + scale * (wanted - logits), others])
    return Retargeted(ConcatDataset([shard, public]), targets)


def _outputs(
    tangent: LinearizedModel,
    loader: DataLoader[Any],
    top: float,
    device: torch.device,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """f(x), and the square loss's targets, (N, C) on the CPU."""
    logits, wanted = [], []
    with evaluating(tangent.anchor):
        for batch in tqdm(loader, "anchor", delay=2, leave=False, disable=not progress):
            inputs, targets = unpack(batch, device)
            found = at_least_single(logits_of(tangent.anchor, inputs)).cpu()
            classes = targets.cpu()
            if found.ndim != 2 or classes.shape != found.shape[:1] or classes.is_floating_point():
                raise ArgumentError(
                    "with_public needs logits (N, C) and targets (N,) of class indices, got "
                    f"{tuple(found.shape)} and {classes.dtype} of shape {tuple(classes.shape)}"
                )
            if classes.min() < 0 or classes.max() >= found.shape[1]:
                raise ArgumentError(
                    f"targets must be class indices from 0 to {found.shape[1] - 1}, got "
                    f"{int(classes.min())} to {int(classes.max())}"
                )
            logits.append(found)
            wanted.append(top * F.one_hot(classes.long(), found.shape[1]).to(found))
    return torch.cat(logits), torch.cat(wanted)
