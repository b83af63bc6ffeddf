"""Classes that several deltas of one tangent model predict, in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.linearized import LinearizedModel


class Estimate(NamedTuple):
    """A share of the samples, or a difference of two shares, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Predictions:
    """What models predict for the same samples.

    Attributes:
        targets: the samples' classes, int64, (N,).
        outputs: C, the number of classes that the models know.
        classes: name of a model -> the classes it predicts, int64, (N,).
    """

    targets: Tensor
    outputs: int
    classes: dict[str, Tensor]

    def right(self, name: str) -> Tensor:
        """Which samples the model classifies correctly, bool, (N,)."""
        return self.classes[name] == self.targets

    def accuracy(self, name: str) -> Estimate:
        """The share of samples that are classified correctly; its error is the binomial one."""
        share = float(self.right(name).double().mean())
        return Estimate(share, math.sqrt(share * (1 - share) / len(self.targets)))

    def gain(self, name: str, over: str) -> Estimate:
        """Accuracy less another model's, with the standard error of the paired differences."""
        differences = self.right(name).double() - self.right(over).double()
        error = float(differences.std(correction=0)) / math.sqrt(len(differences))
        return Estimate(float(differences.mean()), error)

    def totals(self) -> Tensor:
        """Number of samples of each class, int64, (C,)."""
        return torch.bincount(self.targets, minlength=self.outputs)

    def correct_by_class(self, name: str) -> Tensor:
        """Number of samples of each class that are classified correctly, int64, (C,)."""
        return torch.bincount(self.targets[self.right(name)], minlength=self.outputs)

    def confusion(self, name: str) -> Tensor:
        """Number of samples by class, in rows, and by predicted class, int64, (C, C)."""
        pairs = self.targets * self.outputs + self.classes[name]
        return torch.bincount(pairs, minlength=self.outputs**2).view(self.outputs, -1)


@torch.no_grad()
def predictions(
    tangent: LinearizedModel,
    deltas: Mapping[str, Mapping[str, Tensor] | None],
    data: Data,
    *,
    batch_size: int = 128,
    progress: bool = True,
) -> Predictions:
    """The class of the largest logit, for each sample and delta.

    Each image is read once, and the frozen blocks run once, for all deltas.

    Args:
        tangent: the model, whose delta is overwritten; it is put into eval mode.
        deltas: name -> a delta; None for the anchor.
        data: a Dataset or DataLoader of (input, target), targets int64 class indices.
        batch_size: of a Dataset.
        progress: show a bar after two seconds.

    Raises:
        ArgumentError: data is not as above.
        DeltaError: a delta does not fit the model.
    """
    loader = as_loader(data, batch_size, shuffle=False)
    tangent.eval()
    device = place(tangent, None)
    try:
        trunk, tail = tangent.split()
    except UnsupportedError:
        trunk, tail = None, tangent
    outputs, wanted = 0, []
    found: dict[str, list[Tensor]] = {name: [] for name in deltas}
    for batch in tqdm(loader, "evaluate", unit="batch", delay=2, leave=False, disable=not progress):
        inputs, targets = unpack(batch, device)
        entering = inputs if trunk is None else trunk(inputs)
        wanted.append(targets.cpu())
        for name, delta in deltas.items():
            if delta is None:
                tangent.zero_()
            else:
                tangent.load_delta_dict(delta)
            logits = tail(entering)
            outputs = logits.shape[1]
            found[name].append(logits.argmax(dim=1).cpu())
    if not wanted:
        raise ArgumentError("data has no sample: there is nothing to evaluate")
    if (largest := int(torch.cat(wanted).max())) >= outputs:
        raise ArgumentError(f"data has class {largest}, and the model knows {outputs} classes")
    return Predictions(torch.cat(wanted), outputs, {n: torch.cat(c) for n, c in found.items()})
