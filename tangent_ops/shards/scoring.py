"""Counts what several deltas of one tangent model classify correctly, in one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.errors import UnsupportedError
from tangent_ops.model.linearized import LinearizedModel


@torch.no_grad()
def correct_by_class(
    tangent: LinearizedModel,
    deltas: Mapping[str, Mapping[str, Tensor] | None],
    data: Data,
    *,
    batch_size: int = 128,
    progress: bool = True,
) -> dict[str, Tensor]:
    """How many samples of each class have the largest logit at their class.

    Each image is read once, and the frozen blocks run once, for all deltas.

    Args:
        tangent: the model, whose delta is overwritten; it is put into eval mode.
        deltas: name -> a delta; None for the anchor.
        data: a Dataset or DataLoader of (input, target), targets int64 class indices.
        batch_size: of a Dataset.
        progress: show a bar after two seconds.

    Returns:
        Name -> int64 counts, (C,), for C logits.

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
    found: dict[str, Tensor] = {}
    for batch in tqdm(loader, "evaluate", unit="batch", delay=2, leave=False, disable=not progress):
        inputs, targets = unpack(batch, device)
        entering = inputs if trunk is None else trunk(inputs)
        for name, delta in deltas.items():
            if delta is None:
                tangent.zero_()
            else:
                tangent.load_delta_dict(delta)
            logits = tail(entering)
            correct = targets[logits.argmax(dim=1) == targets]
            counts = torch.bincount(correct, minlength=logits.shape[1]).cpu()
            found[name] = found[name] + counts if name in found else counts
    return found
