"""Tile sizes by architecture, dtype, head dimension and direction, from a table checked in as data.

Nothing is tuned at import or on a first call. TANGENT_OPS_AUTOTUNE=1 opts into the latter, on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from tangent_kernels._launch import Config, padded_dim
from tangent_kernels.attention._call import Call

TABLE = Path(__file__).with_name("configs.json")
ARCHS = (80, 90, 100)
DIMS = (64, 128, 256)
DIRECTIONS = (
    "forward x1", "forward x2", "forward x4",
    "first query", "first key value", "first mask",
    "second query", "second key value", "second mask",
)  # fmt: skip


class Key(NamedTuple):
    """What a configuration is chosen by; never the number of tokens."""

    direction: str
    arch: int  # of ARCHS
    bits: int  # of the operands: 16 or 32
    dim: int  # of DIMS: the larger head dimension fits into it


_tuned: dict[Key, Config] = {}  # by TANGENT_OPS_AUTOTUNE=1, or by `using`


@functools.cache
def table() -> dict[Key, Config]:
    """The checked-in table."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        Key(direction, int(arch), int(bits), int(dim)): Config(*numbers)
        for arch, by_bits in found["configs"].items()
        for bits, by_dim in by_bits.items()
        for dim, by_direction in by_dim.items()
        for direction, numbers in by_direction.items()
    }


def configure(direction: str, call: Call, tangents: int = 0) -> tuple[Config, int]:
    """The configuration of a kernel, and how many of ``tangents`` one program takes.

    "forward" becomes "forward x4", "x2" or "x1", the most tangents that fit into registers.
    """
    if direction != "forward":
        return _lookup(key_of(direction, call)), 0
    for group in (4, 2):
        key = key_of(f"forward x{group}", call)
        if group <= tangents and (key in table() or key in _tuned):
            return _lookup(key), group
    return _lookup(key_of("forward x1", call)), min(tangents, 1)


def key_of(direction: str, call: Call) -> Key:
    return Key(
        direction,
        family(call.arch),
        8 * max(call.query.itemsize, 2),
        dim_class(call.query.shape[-1], call.value.shape[-1]),
    )


def family(arch: int) -> int:
    """The architecture whose tiles serve this one: its matrix units, and no more shared memory."""
    return {90: 90, 100: 100, 103: 100}.get(arch, 80)


def dim_class(*dims: int) -> int:
    """The smallest of DIMS that every head dimension's tile fits into."""
    return next(size for size in DIMS if padded_dim(max(dims)) <= size)


def _lookup(key: Key) -> Config:
    return _tuned.get(key) or table()[key]


@contextlib.contextmanager
def using(key: Key, config: Config) -> Iterator[None]:
    """Within this context calls of ``key`` take ``config``."""
    before = _tuned.get(key)
    _tuned[key] = config
    try:
        yield
    finally:
        if before is None:
            del _tuned[key]
        else:
            _tuned[key] = before


def candidates(key: Key) -> list[Config]:
    """Configurations worth compiling: tiles of at most 16 K scores, one to three stages."""
    sides = (16, 32, 64, 128)
    return [
        Config(rows, cols, warps, stages)
        for rows in sides
        for cols in sides
        for warps in (4, 8)
        for stages in (1, 2, 3)
        if rows * cols <= 64 * 128 and 16 * warps <= 2 * max(rows, cols)
    ]


def autotuning() -> bool:
    """Whether the user opted into tuning on first calls."""
    return os.environ.get("TANGENT_OPS_AUTOTUNE", "0").lower() in ("1", "true", "on", "yes")


def autotune(call: Call, directions: tuple[str, ...], run: Callable[[], object]) -> None:
    """Time the candidates of each direction on ``run``, once for each key, and keep the fastest."""
    if not (autotuning() and call.query.is_cuda) or torch.cuda.is_current_stream_capturing():
        return
    for direction in directions:
        key = key_of(direction, call)
        if key in _tuned:
            continue
        times = {}
        for config in [table()[key], *candidates(key)]:
            with using(key, config), contextlib.suppress(triton.CompilationError, RuntimeError):
                times[config] = triton.testing.do_bench(run, warmup=5, rep=20)
        _tuned[key] = min(times, key=times.__getitem__) if times else table()[key]
