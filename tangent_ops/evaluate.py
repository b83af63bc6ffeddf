"""Run a model over a data set: logits and accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tangent_ops.errors import ArgumentError

Data = DataLoader[Any] | Dataset[Any]


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
        model: any module of one input; its train/eval modes are restored at the end.
        data: a Dataset, or a DataLoader read in its own order, of inputs or (input, target, ...).
        batch_size: of a Dataset; a DataLoader has its own.
        device: moves the model there first; None for where it is.
        progress: show a bar if it takes more than two seconds.

    Returns:
        (N, ...): the outputs of all batches one after the other, on the CPU.

    Raises:
        ArgumentError: data is neither, is empty, or yields something else.
    """
    loader = as_loader(data, batch_size, shuffle=False)
    device = place(model, device)
    outputs = []
    with _evaluating(model):
        for batch in _bar(loader, progress):
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(inputs, Tensor):
                raise ArgumentError(f"data must yield tensors first, got {_describe(batch)}")
            outputs.append(model(inputs.to(device, non_blocking=True)).cpu())
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
        data: a Dataset or DataLoader of (input, target), targets int64 class indices.
        batch_size: of a Dataset; a DataLoader has its own.
        device: moves the model there first; None for where it is.
        progress: show a bar if it takes more than two seconds.

    Returns:
        A number from 0 to 1.

    Raises:
        ArgumentError: data is neither, is empty, or yields something else; the logits are not
            (N, C).
    """
    loader = as_loader(data, batch_size, shuffle=False)
    device = place(model, device)
    correct = samples = 0
    with _evaluating(model):
        for batch in _bar(loader, progress):
            inputs, targets = unpack(batch, device)
            logits = model(inputs)
            if logits.ndim != 2 or targets.shape != logits.shape[:1]:
                raise ArgumentError(
                    "accuracy needs logits of shape (N, C) and targets of shape (N,), got "
                    f"{tuple(logits.shape)} and {tuple(targets.shape)}"
                )
            correct += int((logits.argmax(dim=1) == targets).sum())
            samples += len(targets)
    return correct / samples


def as_loader(data: Data, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
    """Give `data` back if it is a DataLoader, else batch it; raise ArgumentError if it is empty."""
    check_integer("batch_size", batch_size, 1)
    if not isinstance(data, (DataLoader, Dataset)):
        raise ArgumentError(
            f"data must be a DataLoader or a Dataset of (input, target), got a "
            f"{type(data).__name__}: wrap tensors in torch.utils.data.TensorDataset"
        )
    try:
        length = len(data)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        kind = type(data).__name__
        raise ArgumentError(f"data must have a length, this {kind} has none") from error
    if length == 0:
        hint = ": is the dataset smaller than a batch, with drop_last=True?"
        raise ArgumentError(f"data is empty{hint if isinstance(data, DataLoader) else ''}")
    if isinstance(data, DataLoader):
        return data
    # With shuffle the order comes from the global generator, which fit seeds; without, its own
    # generator keeps the loader from drawing a worker seed from the caller's.
    generator = None if shuffle else torch.Generator()
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)


def check_integer(name: str, value: object, low: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(f"{name} must be an integer of at least {low}, got {value!r}")


def unpack(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move an (input, target) batch to `device`; raise ArgumentError if it is anything else."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ArgumentError(f"data must yield (input, target) batches, got {_describe(batch)}")
    inputs, targets = batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise ArgumentError(f"input and target must be tensors, got {_describe(batch)}")
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise ArgumentError(
            "input and target must have the same batch size, got shapes "
            f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Move a model to `device`, if given; return where its parameters are."""
    if device is not None:
        model.to(device)
    parameter = next(model.parameters(), None)
    return torch.device(device or "cpu") if parameter is None else parameter.device


def _bar(loader: DataLoader[Any], progress: bool) -> Iterable[Any]:
    return tqdm(loader, "evaluate", unit="batch", delay=2, leave=False, disable=not progress)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in batch)
        return f"a {type(batch).__name__} of {len(batch)}: ({inside})"
    return f"a {type(batch).__name__}"
