"""`jacobian_norms`: the spectral norm of each sample's Jacobian."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import Data, in_order, place, unpack_one
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.problem import Cache, cached, check_tangent
from tangent_ops.model.linearized import LinearizedModel

_COLUMNS = 1 << 16  # of J that are in float64 at a time


def jacobian_norms(
    tangent: LinearizedModel,
    data: Data,
    *,
    batch_size: int = 64,
    cache: Cache = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Tensor:
    """‖J(x)‖₂ of every sample, to choose a bound on it from *public* data.

    Exact: the root of the largest eigenvalue of J Jᵀ (C, C), summed and solved in float64. Each
    norm depends on its own sample alone. One forward pass and C backward passes per sample.

    Args:
        tangent: the model; its deltas are not used.
        data: a Dataset of (input, target), or a DataLoader; all samples are read, in order.
        batch_size: of a Dataset; a DataLoader has its own.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        progress: show a bar if it takes more than two seconds.

    Returns:
        (N,): float64, on the CPU, in logits per unit of Δ.

    Raises:
        ArgumentError: an invalid argument; a norm is not finite.
        UnsupportedError: cache, for a model that cannot be split.
    """
    check_tangent(tangent)
    model, loader = entering(tangent, in_order(data, batch_size), cache, device, progress)
    jacobian = Jacobian(model)
    with norms_bar(loader, progress) as bar:
        found = [
            batch_norms(jacobian, unpack_one(batch, jacobian.device)[0], bar) for batch in loader
        ]
    return torch.cat(found)


def entering(
    tangent: LinearizedModel,
    loader: DataLoader,
    cache: Cache,
    device: str | torch.device | None,
    progress: bool,
) -> tuple[LinearizedModel, DataLoader]:
    """The model, or its tail, with a loader of what enters it, in the order of `loader`.

    Raises:
        UnsupportedError: cache, for a model that cannot be split.
    """
    place(tangent, device)
    if cache is False:
        return tangent, loader
    _, tail, features = cached(tangent, loader, cache, progress)
    return tail, features


def norms_bar(loader: DataLoader, progress: bool) -> tqdm:
    """A progress bar over a loader's samples, for `batch_norms`."""
    return tqdm(
        total=len(loader.dataset),  # pyright: ignore[reportArgumentType]
        desc="Jacobian norms",
        unit="sample",
        delay=2,
        leave=False,
        disable=not progress,
    )


def batch_norms(jacobian: Jacobian, inputs: Tensor, bar: tqdm) -> Tensor:
    """‖J(x)‖₂ of each input of a batch: (n,) float64, on the CPU.

    Raises:
        ArgumentError: a norm is not finite.
    """
    norms = []
    for one in inputs[:, None]:
        norms.append(_norm(jacobian.rows(one)))
        if not math.isfinite(norms[-1]):
            raise ArgumentError(
                "the Jacobian of a sample is not finite: check the inputs for NaN and outliers, "
                "or clamp all of them to a fixed range"
            )
        bar.update()
    return torch.tensor(norms, dtype=torch.float64)


def _norm(rows: Tensor) -> float:
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(_COLUMNS, dim=1):
        gram.addmm_(part.double(), part.double().T)
    if not gram.isfinite().all():
        return math.nan
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
