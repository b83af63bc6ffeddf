"""Checks and batches users' data: datasets and loaders of (input, target) pairs, or of dicts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.fields import Fields, Inputs

Data = DataLoader[Any] | Dataset[Any]

LABELS = ("labels", "label")  # fields of a dict that are the targets


def as_loader(data: Data, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
    """Return a DataLoader as it is, batch a Dataset; raise ArgumentError if `data` is empty."""
    check_integer("batch_size", batch_size, 1)
    if not isinstance(data, (DataLoader, Dataset)) and not _is_indexed(data):
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


def check_integer(name: str, value: object, low: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_choice(
    name: str, value: object, choices: Mapping[str, Any] | Sequence[str], rest: str = ""
) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise ArgumentError(f"{name} must be one of {[*choices]}{rest}, got {value!r}")


def check_positive(**values: float) -> None:
    """Raise ArgumentError, naming it, for a value that is not finite and positive."""
    for name, value in values.items():
        if not (_is_finite(value) and value > 0):
            raise ArgumentError(f"{name} must be positive and finite, got {value!r}")


def check_not_negative(**values: float) -> None:
    """Raise ArgumentError, naming it, for a value that is not finite, or negative."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            raise ArgumentError(f"{name} must be finite and not negative, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def unpack(batch: Any, device: torch.device) -> tuple[Inputs, Tensor]:
    """Move a batch's inputs and targets to `device`; raise ArgumentError if it has others.

    A batch is an (input, target) pair, or a dict whose field "labels" or "label" is the target. The
    other fields of a dict are what the model is called with, by name; the labels are not.
    """
    if isinstance(batch, Mapping):
        given = [name for name in LABELS if name in batch]
        if len(given) != 1:
            raise ArgumentError(
                f"a dict of fields must have its targets as 'labels', or 'label', got "
                f"{describe(batch)}"
            )
        inputs, targets = inputs_of(batch), batch[given[0]]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        inputs = inputs_of(inputs) if isinstance(inputs, Mapping) else inputs
    else:
        raise ArgumentError(
            f"data must yield (input, target) batches, got {describe(batch)}; dicts with 'labels' "
            "are batches, too"
        )
    if not isinstance(inputs, (Tensor, Fields)) or not isinstance(targets, Tensor):
        raise ArgumentError(f"input and target must be tensors, got {describe(batch)}")
    flat = isinstance(inputs, Tensor) and inputs.ndim == 0
    if flat or targets.ndim == 0 or len(inputs) != len(targets):
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else inputs
        raise ArgumentError(
            "input and target must have the same batch size, got shapes "
            f"{shape} and {tuple(targets.shape)}"
        )
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def unpack_one(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `unpack`, with one tensor as inputs: that of the only field, if there are fields.

    Raises:
        UnsupportedError: there are several fields.
    """
    inputs, targets = unpack(batch, device)
    if not isinstance(inputs, Fields):
        return inputs, targets
    if len(inputs.tensors) > 1:
        raise UnsupportedError(
            f"private training takes one input tensor, got the fields {sorted(inputs.tensors)}: "
            "train on features that are computed once (tangent_ops.cache_features)"
        )
    return next(iter(inputs.tensors.values())), targets


def inputs_of(batch: Mapping[str, Any]) -> Fields:
    """The fields of a batch but its labels; raise ArgumentError if one is no tensor."""
    fields = {name: value for name, value in batch.items() if name not in LABELS}
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            raise ArgumentError(
                f"the field {name!r} of a batch is a {type(value).__name__}, not a tensor: the "
                "model is called with every field but the labels. Leave it out of the data "
                "(remove_columns), or make it a tensor (with_format('torch'))"
            )
    return Fields(fields)


def _is_indexed(data: object) -> bool:
    """Whether it is a data set without torch's base class, as Hugging Face's `datasets.Dataset`."""
    plain = isinstance(data, (Mapping, Sequence, Tensor)) or hasattr(data, "__array__")
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Move a model to `device`, if given; return where its parameters are."""
    if device is not None:
        model.to(device)
    parameter = next(model.parameters(), None)
    return torch.device(device or "cpu") if parameter is None else parameter.device


def describe(batch: Any) -> str:
    """Name a batch's type and its items' types, for error messages."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of the fields {sorted(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in batch)
        return f"a {type(batch).__name__} of {len(batch)}: ({inside})"
    return f"a {type(batch).__name__}"
