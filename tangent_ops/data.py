"""Checks and batches users' data: datasets and loaders of (input, target) pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tangent_ops.checks import (  # noqa: F401 - modules that need torch import them from here
    check_choice,
    check_integer,
    check_not_negative,
    check_positive,
    did_you_mean,
)
from tangent_ops.errors import ArgumentError

Data = DataLoader[Any] | Dataset[Any]


def as_loader(data: Data, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
    """Return a DataLoader as it is, batch a Dataset; raise ArgumentError if `data` is empty."""
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
    # With shuffle the order comes from the global generator, which fit seeds. Without it, a
    # generator of its own keeps the loader from drawing a worker seed from the global one.
    generator = None if shuffle else torch.Generator()
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)


def in_order(data: Data, batch_size: int, dataset: Dataset[Any] | None = None) -> DataLoader[Any]:
    """Give a loader that yields every sample, in the data set's own order.

    Args:
        data: a Dataset with indices, or a DataLoader, whose batch size, workers and collation are
            kept.
        batch_size: of a Dataset.
        dataset: read instead of the data's own, in the same batches.

    Raises:
        ArgumentError: as `as_loader`; or a data set that is a stream.
    """
    loader = as_loader(data, batch_size, shuffle=False)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ArgumentError(
            "data must be a Dataset with indices, or a DataLoader of one that makes batches: "
            "the samples are read in order, many times"
        )
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        batch_size=loader.batch_size or batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # else the loader would draw from the caller's
    )


def unpack(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move an (input, target) batch to `device`; raise ArgumentError if it is anything else."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ArgumentError(f"data must yield (input, target) batches, got {describe(batch)}")
    inputs, targets = batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise ArgumentError(f"input and target must be tensors, got {describe(batch)}")
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


def describe(batch: Any) -> str:
    """Name a batch's type and its items' types, for error messages."""
    if isinstance(batch, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in batch)
        return f"a {type(batch).__name__} of {len(batch)}: ({inside})"
    return f"a {type(batch).__name__}"
