"""Low-rank deltas: Δw = B A of every matrix, A fixed with orthonormal rows, B trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError

Basis = int | Mapping[str, Tensor]

# Entries of a drawn basis are multiples of this. The last bits of a QR differ from one processor
# to the next; rounded away, the basis is the same on both, and so is its fingerprint.
GRID = 2.0**-20
_ORTHONORMAL = 1e-4


def make_bases(
    parameters: Mapping[str, Tensor], rank: int, basis: Basis, known: Iterable[str]
) -> dict[str, Tensor]:
    """The fixed factors A of the parameters that are large enough to have one.

    Args:
        parameters: the anchor's chosen parameters, by name.
        rank: rows of A.
        basis: a seed, or name -> (rank, in) with orthonormal rows.
        known: names of all of the anchor's parameters; a given basis may have more than is trained.

    Returns:
        name -> (rank, in) in the dtype and on the device of that parameter's delta.

    Raises:
        ArgumentError: rank is no positive integer; basis is neither a seed nor a mapping, lacks a
            name or has an unknown one, or a tensor of it has a wrong shape or dtype, or rows that
            are not orthonormal.
    """
    check_rank(rank)
    shapes = {n: matrix_shape(p) for n, p in parameters.items() if has_low_rank(p, rank)}
    if isinstance(basis, Mapping):
        found = _given(shapes, rank, basis, set(known))
    elif isinstance(basis, int) and not isinstance(basis, bool):
        found = {name: _drawn(name, rank, shape[1], basis) for name, shape in shapes.items()}
    else:
        raise ArgumentError(
            f"basis is a {type(basis).__name__}: expected an int, the seed of a random basis, or a "
            "dict of tensors as tangent_ops.gradient_basis gives"
        )
    return {
        name: value.to(parameters[name].device, delta_dtype(parameters[name].dtype))
        for name, value in found.items()
    }


def check_rank(rank: object) -> None:
    """Raise ArgumentError unless it is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ArgumentError(f"rank={rank!r}: expected a positive integer")


def has_low_rank(parameter: Tensor, rank: int) -> bool:
    """Whether B and A of that rank are smaller than the parameter in both directions."""
    return parameter.ndim >= 2 and min(matrix_shape(parameter)) > rank


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """(out, in): the first dimension, and all others together."""
    return parameter.shape[0], parameter.shape[1:].numel()


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's delta: float32 for 16 bits, in which small steps would be lost."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def product(delta: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """B A as a tangent of that shape; in the factors' own dtype under autocast, too."""
    with torch.autocast(delta.device.type, enabled=False):
        return (delta @ basis).view(shape)


def _drawn(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """Random orthonormal rows, the same for a name and a seed whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    gaussian = torch.randn(columns, rank, generator=source, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    rows = (q * r.diagonal().sign()).T  # a QR is unique up to these signs
    return (rows / GRID).round().mul(GRID).contiguous()


def _given(
    shapes: Mapping[str, tuple[int, int]], rank: int, basis: Mapping[str, Tensor], known: set[str]
) -> dict[str, Tensor]:
    missing, unknown = sorted(shapes.keys() - basis.keys()), sorted(basis.keys() - known)
    if missing:
        raise ArgumentError(
            f"basis lacks {_few(missing)}: give each low-rank parameter a ({rank}, in) tensor, "
            "or train fewer"
        )
    if unknown:
        raise ArgumentError(f"basis has {_few(unknown)}, which the model has not")
    for name, (_, columns) in shapes.items():
        value = basis[name]
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"basis of {name} is a {kind}: expected float32 or float64")
        if value.shape != (rank, columns):
            raise ArgumentError(
                f"basis of {name} has shape {tuple(value.shape)}: expected {(rank, columns)}"
            )
        exact = value.detach().double()
        eye = torch.eye(rank, dtype=torch.float64, device=exact.device)
        distance = float((exact @ exact.T - eye).abs().max())
        if not distance <= _ORTHONORMAL:  # a NaN is caught, too
            raise ArgumentError(
                f"basis of {name} has no orthonormal rows: A Aᵀ is {distance:.1e} from the "
                "identity; torch.linalg.qr(A.T).Q.T makes them so"
            )
    return {name: basis[name].detach().clone() for name in shapes}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
