"""Computes a model's outputs and accuracy over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, describe, inputs_of, place, unpack
from tangent_ops.errors import ArgumentError
from tangent_ops.family import logits_of
from tangent_ops.fields import Fields


def predict(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Tensor:
    """Compute a model's outputs in eval mode, without gradients.

    Args:
        model: any module of one input, or of the data's fields; its train/eval modes are restored
            at the end.
        data: a Dataset, or a DataLoader read in its own order, of inputs, (input, target, ...), or
            dicts, whose labels are not read.
        batch_size: batch size for a Dataset; a DataLoader has its own.
        device: device to move the model to first; None to leave it.
        progress: show a progress bar after two seconds.

    Returns:
        (N, ...): the outputs of all batches one after the other, on the CPU. Of a Hugging Face
        model these are its logits.

    Raises:
        ArgumentError: data has another type, is empty, or yields something else.
    """
    loader = as_loader(data, batch_size, shuffle=False)
    device = place(model, device)
    outputs = []
    with evaluating(model):
        for batch in _bar(loader, progress):
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            inputs = inputs_of(inputs) if isinstance(inputs, Mapping) else inputs
            if not isinstance(inputs, (Tensor, Fields)):
                raise ArgumentError(f"data must yield tensors first, got {describe(batch)}")
            outputs.append(logits_of(model, inputs.to(device, non_blocking=True)).cpu())
    return torch.cat(outputs)


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> float:
    """Compute the fraction of samples whose largest logit is the target's.

    Args:
        model: any module with logits (N, C) as output; its train/eval modes are restored.
        data: a Dataset or DataLoader of (input, target), or of dicts with "labels"; targets are
            int64 class indices.
        batch_size: batch size for a Dataset; a DataLoader has its own.
        device: device to move the model to first; None to leave it.
        progress: show a progress bar after two seconds.

    Returns:
        A number from 0 to 1.

    Raises:
        ArgumentError: data has another type, is empty, or yields something else; the logits are not
            (N, C).
    """
    loader = as_loader(data, batch_size, shuffle=False)
    device = place(model, device)
    correct = samples = 0
    with evaluating(model):
        for batch in _bar(loader, progress):
            inputs, targets = unpack(batch, device)
            logits = logits_of(model, inputs)
            if logits.ndim != 2 or targets.shape != logits.shape[:1]:
                raise ArgumentError(
                    "accuracy needs logits of shape (N, C) and targets of shape (N,), got "
                    f"{tuple(logits.shape)} and {tuple(targets.shape)}"
                )
            correct += int((logits.argmax(dim=1) == targets).sum())
            samples += len(targets)
    return correct / samples


def _bar(loader: DataLoader[Any], progress: bool) -> Iterable[Any]:
    return tqdm(loader, "evaluate", unit="batch", delay=2, leave=False, disable=not progress)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode; its modules' modes are restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
