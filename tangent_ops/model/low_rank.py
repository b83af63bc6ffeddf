"""The fixed factors of deltas that are not full: low rank and cores.

low rank    Δw = B A      A fixed with orthonormal rows, B trained
core        Δw = B C A    A likewise, B fixed with orthonormal columns, C trained
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError, few

Basis = int | Mapping[str, Tensor]
Core = int | tuple[int, int] | Mapping[str, tuple[Tensor, Tensor]]
Sides = dict[str, Tensor]

# Entries of a random basis are rounded to multiples of this. The last bits of a QR differ between
# processors; without them the basis and its fingerprint are the same everywhere.
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
        known: names of all parameters of the anchor; a given basis may include untrained ones.

    Returns:
        name -> (rank, in) in the dtype and on the device of that parameter's delta.

    Raises:
        ArgumentError: rank is no positive integer; basis is neither a seed nor a mapping, lacks a
            name, or has an unknown name, a wrong shape or dtype, or rows that are not orthonormal.
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


def make_cores(
    parameters: Mapping[str, Tensor], core: Core, seed: Basis, known: Iterable[str]
) -> tuple[Sides, Sides]:
    """The fixed factors of Δw = B C A.

    Args:
        parameters: the anchor's chosen parameters, by name.
        core: name -> (B, A), of shapes (out, r_out) and (r_in, in); or (r_out, r_in), or one
            number for both, for random factors of the parameters that are larger in both
            directions. Parameters without factors keep full deltas.
        seed: of random factors; 0 with given ones.
        known: names of all parameters of the anchor; given factors may include untrained ones.

    Returns:
        name -> A and name -> B, in the dtype and on the device of that parameter's delta.

    Raises:
        ArgumentError: core is none of these, or has an unknown name, a parameter that is no
            matrix, a wrong shape or dtype, or factors that are not orthonormal; seed is no
            integer, or is given beside given factors.
    """
    if isinstance(core, Mapping):
        if not isinstance(seed, int) or seed != 0:
            raise ArgumentError("basis is the seed of a random core: leave it out with given ones")
        pairs = _given_cores(parameters, core, set(known))
    else:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(
                f"basis is a {type(seed).__name__}: expected an int, the seed of a random core; "
                "given factors are a dict in `core`"
            )
        out, within = core_sizes(core)
        shapes = {n: matrix_shape(p) for n, p in parameters.items() if p.ndim >= 2}
        pairs = {
            n: drawn_sides(n, (out, within), (rows, columns), seed)
            for n, (rows, columns) in shapes.items()
            if rows > out and columns > within
        }

    def like_delta(side: Tensor, name: str) -> Tensor:
        parameter = parameters[name]
        return side.to(parameter.device, delta_dtype(parameter.dtype)).contiguous()

    right = {name: like_delta(pair[1], name) for name, pair in pairs.items()}
    return right, {name: like_delta(pair[0], name) for name, pair in pairs.items()}


def drawn_sides(
    name: str, size: tuple[int, int], shape: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Random sides B (out, r_out) and A (r_in, in) of a core (r_out, r_in)."""
    left = _drawn(f"{name}:left", size[0], shape[0], seed).T
    return left, _drawn(name, size[1], shape[1], seed)


def core_sizes(core: Any) -> tuple[int, int]:
    """(r_out, r_in) of a core's size; raise ArgumentError unless it is one or two integers."""
    pair = core if isinstance(core, (tuple, list)) else (core, core)
    if len(pair) != 2 or any(type(size) is not int or size < 1 for size in pair):
        raise ArgumentError(
            f"core={core!r}: expected a positive integer, two of them (r_out, r_in), or a dict of "
            "pairs of tensors (B, A)"
        )
    return pair[0], pair[1]


def _given_cores(
    parameters: Mapping[str, Tensor], core: Mapping[str, tuple[Tensor, Tensor]], known: set[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    if unknown := sorted(core.keys() - known):
        raise ArgumentError(f"core has {few(unknown)}, which the model does not have")
    found = {}
    for name in (n for n in parameters if n in core):
        pair = core[name]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(f"core of {name} is no pair of tensors (B, A)")
        if parameters[name].ndim < 2:
            raise ArgumentError(f"core has {name}, which is no matrix: leave it out")
        rows, columns = matrix_shape(parameters[name])
        left, right = pair
        turned = left.mT if _is_matrix(left) else left
        _check_rows(turned, None, rows, f"the transposed B of {name}")
        _check_rows(right, None, columns, f"A of {name}")
        found[name] = (left.detach().clone(), right.detach().clone())
    return found


def check_rank(rank: object) -> None:
    """Raise ArgumentError unless ``rank`` is a positive integer."""
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


def _drawn(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """Random orthonormal rows that depend on the name and the seed only."""
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
            f"basis lacks {few(missing)}: give each low-rank parameter a ({rank}, in) tensor, "
            "or train fewer"
        )
    if unknown:
        raise ArgumentError(f"basis has {few(unknown)}, which the model does not have")
    for name, (_, columns) in shapes.items():
        _check_rows(basis[name], rank, columns, f"basis of {name}")
    return {name: basis[name].detach().clone() for name in shapes}


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _check_rows(value: object, rank: int | None, columns: int, what: str) -> None:
    """Raise ArgumentError unless the value has orthonormal rows, ``rank`` of them if given."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{what} is a {kind}: expected float32 or float64")
    if rank is None and value.ndim == 2 and 1 <= len(value) <= columns:
        rank = len(value)
    if value.shape != (rank, columns):
        expected = f"(up to {columns}, {columns})" if rank is None else (rank, columns)
        raise ArgumentError(f"{what} has shape {tuple(value.shape)}: expected {expected}")
    exact = value.detach().double()
    eye = torch.eye(len(exact), dtype=torch.float64, device=exact.device)
    distance = float((exact @ exact.T - eye).abs().max())
    if not distance <= _ORTHONORMAL:  # also for NaN
        raise ArgumentError(
            f"{what} has no orthonormal rows: A Aᵀ is {distance:.1e} from the "
            "identity; torch.linalg.qr(A.T).Q.T makes them so"
        )
