"""Checks of data sets and models for faults that would silently void a privacy guarantee."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from tangent_ops.data import unpack_one
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.files import add_tensor
from tangent_ops.model.features import CachedFeatures
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.statement import ADD_OR_REMOVE, PrivacyStatement, check_adjacency

STANDARD = 1e-4  # only standardised data are this close to mean 0 and deviation 1
WHITENING = ("LinearTransformation",)  # torchvision's; its matrix is computed from data


def check_dataset(dataset: object, public_preprocessing: bool) -> int:
    """Check a data set, and return its number of samples.

    Raises:
        ArgumentError: the data set is not map-style, is empty, or has an index twice.
        UnsupportedError: preprocessing was fitted to data, and public_preprocessing is False.
    """
    if isinstance(dataset, DataLoader):
        raise ArgumentError(
            "dataset is a DataLoader: pass loader.dataset. The guarantee needs batches that are "
            "drawn by Poisson sampling, and joined by torch's default_collate: another collate_fn "
            "may mix samples"
        )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset):
        raise ArgumentError(
            f"dataset must be a map-style Dataset of (input, target), got a "
            f"{type(dataset).__name__}: Poisson sampling needs indices"
        )
    try:
        count = len(dataset)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        kind = type(dataset).__name__
        raise ArgumentError(f"dataset must have a length, this {kind} has none") from error
    if count == 0:
        raise ArgumentError("dataset is empty")
    (_, times), *_ = Counter(_identities(dataset, count)).most_common(1)
    if times > 1:
        raise ArgumentError(
            f"dataset has one sample {times} times: it would add {times} times max_grad_norm to a "
            "step. Leave the repetitions out"
        )
    if not public_preprocessing:
        for part in _parts(dataset):
            _check_preprocessing(part)
    return count


def check_contents(loader: DataLoader) -> None:
    """Read all samples; raise ArgumentError if two have the same input, bit for bit."""
    first: dict[bytes, int] = {}
    with torch.random.fork_rng(devices=[]):  # augmentation may draw from the global generator
        for batch in loader:
            inputs, _ = unpack_one(batch, torch.device("cpu"))
            for index, one in enumerate(inputs, len(first)):
                digest = hashlib.sha256()
                add_tensor(digest, one)
                other = first.setdefault(digest.digest(), index)
                if other != index:
                    raise ArgumentError(
                        f"dataset has one sample 2 times: the inputs {other} and {index} are the "
                        "same, bit for bit. Together they would move the result twice as far as "
                        "the guarantee allows one sample. Leave the repetitions out"
                    )


def check_model(tangent: object) -> None:
    """Raise unless it is a tangent model, without FSDP or batch norms that use the batch."""
    if not isinstance(tangent, LinearizedModel):
        raise ArgumentError(
            f"tangent must be a LinearizedModel, got a {type(tangent).__name__}: pass it through "
            "tangent_ops.linearize first"
        )
    if tangent.uses_fsdp:
        raise UnsupportedError(
            "the anchor is under FSDP, and every process would have to call it equally often, but "
            "a process's part of a Poisson-sampled batch may be empty. Use an anchor without FSDP"
        )
    for name, module in tangent.anchor.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise UnsupportedError(
                f"{name} is a batch norm that normalises by the batch: a sample's gradient depends "
                "on the other samples. Call tangent.anchor.eval(), or replace it by a group norm "
                "in a new anchor"
            )


def check_start(
    tangent: LinearizedModel, start: PrivacyStatement | str, goes_on: bool = False
) -> tuple[Phase, ...]:
    """The phases in which the deltas were trained before; a checkpoint replaces the deltas.

    Raises:
        ArgumentError: start is "zero", and the deltas are not; or its adjacency is another.
    """
    if isinstance(start, PrivacyStatement):
        check_adjacency(ADD_OR_REMOVE, start.adjacency)
        return start.phases
    moved = [name for name, delta in tangent.deltas().items() if delta.detach().any()]
    if start == "zero" and moved and not goes_on:
        raise ArgumentError(
            f"the deltas are not zero ({moved[0]}), and may come from private data: call "
            "tangent.zero_(); or give Privacy(start=), the PrivacyStatement that they were trained "
            "with, or 'public' if they depend on no private sample"
        )
    return ()


def _identities(dataset: Any, count: int) -> Iterable[tuple[int, int]]:
    """Each sample's identity: the id of the innermost dataset, and the index there."""
    if isinstance(dataset, Subset):
        inner = list(_identities(dataset.dataset, len(dataset.dataset)))  # pyright: ignore
        return [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [pair for part in dataset.datasets for pair in _identities(part, len(part))]  # pyright: ignore
    return ((id(dataset), index) for index in range(count))


def _parts(dataset: Any) -> Iterator[Any]:
    """A dataset and those inside it."""
    yield dataset
    inside = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    for part in inside:
        if part is not None:
            yield from _parts(part)


def _check_preprocessing(dataset: Any) -> None:
    way_out = (
        "Preprocessing that is fitted to private data is published with the model, and no "
        "statement counts it: fit it to public data. If it is, give "
        "Privacy(public_preprocessing=True)"
    )
    for attribute in ("transform", "transforms", "target_transform"):
        for step in _steps(getattr(dataset, attribute, None)):
            if _is_fitted(step):
                kind = type(step).__name__
                raise UnsupportedError(f"dataset's {attribute} has a fitted {kind}. {way_out}")
    values = _tensor(dataset)
    if values is not None and _is_standardised(values):
        raise UnsupportedError(
            f"each feature of dataset's inputs has mean 0 and deviation 1 within {STANDARD:g}: "
            f"they were standardised by their own statistics. {way_out}"
        )


def _steps(transform: Any) -> Iterator[Any]:
    if transform is None:
        return
    yield transform
    for inner in ("transforms", "transform", "steps"):
        value = getattr(transform, inner, None)
        for step in value if isinstance(value, (list, tuple)) else [value]:
            yield from _steps(step[1] if isinstance(step, tuple) else step)
    if isinstance(transform, nn.Module):
        for child in transform.children():
            yield from _steps(child)


def _is_fitted(step: Any) -> bool:
    """Whether a step was fitted to data: by scikit-learn's naming conventions, or its class."""
    learned = any(
        name.endswith("_") and not name.startswith("_") for name in getattr(step, "__dict__", {})
    )
    return learned or hasattr(step, "partial_fit") or type(step).__name__ in WHITENING


def _tensor(dataset: Any) -> Tensor | None:
    if isinstance(dataset, TensorDataset):
        values = dataset.tensors[0]
    elif isinstance(dataset, CachedFeatures):
        values = dataset.features
    else:
        return None
    return values if values.is_floating_point() and values.ndim > 1 and len(values) > 1 else None


def _is_standardised(values: Tensor) -> bool:
    """Whether every feature, or every channel of images, has mean 0 and deviation 1."""
    over = [(0,)] + ([(0, *range(2, values.ndim))] if values.ndim > 2 else [])
    for dims in over:
        deviations = [torch.std_mean(values, dims, correction=c) for c in (0, 1)]
        if any(
            float((deviation - 1).abs().max()) < STANDARD and float(mean.abs().max()) < STANDARD
            for deviation, mean in deviations
        ):
            return True
    return False
