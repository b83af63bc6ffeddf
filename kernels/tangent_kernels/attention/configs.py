"""Chooses tile sizes by architecture, dtype, head dimension and direction, from configs.json.

By default nothing is tuned. TANGENT_OPS_AUTOTUNE=1 tunes on first calls, on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from triton.errors import TritonError

from tangent_kernels import timing
from tangent_kernels._launch import Config, device_of, padded_dim
from tangent_kernels.attention._call import Call

TABLE = Path(__file__).with_name("configs.json")
ARCHS = (80, 90, 100)
DIMS = (64, 128, 256)
DIRECTIONS = (
    "forward x1", "forward x2", "forward x4", "forward masked",
    "first query", "first key value", "first mask",
    "second query", "second query masked", "second key value", "second key value masked",
    "second mask",
    "primal query", "primal key value", "primal mask",
)  # fmt: skip

# The table may lack "forward x2" and "x4" (several tangents in a program), and "... masked" (other
# tiles for a mask, dropout or causality). Where it has "primal ..." it lacks "second ...": too few
# registers hold all sums, and the gradients of the tangents are those of first order.
OPTIONAL = (
    "forward x2", "forward x4", "second query masked", "second key value masked",
    "primal query", "primal key value", "primal mask",
)  # fmt: skip

TRIED = 12  # candidates per key that autotune compiles


class Key(NamedTuple):
    """The key of a configuration; it does not contain the number of tokens."""

    direction: str
    arch: int  # of ARCHS
    bits: int  # of the operands: 16 or 32
    dim: int  # of DIMS: the smallest that holds both head dimensions


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
    """The configuration of a kernel, and the number of ``tangents`` that one program computes.

    "forward" becomes "forward x4", "x2" or "x1", the most tangents that fit into registers. With a
    mask or dropout a program computes one tangent, and with a mask the tiles are smaller. With
    dropout they have half the keys, because Philox takes many registers. A backward kernel may have
    other tiles for such calls ("... masked").
    """
    if direction != "forward":
        return _lookup(key_of(backward_direction(direction, call), call)), 0
    several = call.mask is None and call.seed is None
    for group in (4, 2) if several else ():
        key = key_of(f"forward x{group}", call)
        if group <= tangents and _has(key):
            return _lookup(key), group
    one = "forward x1" if call.mask is None else "forward masked"
    config = _lookup(key_of(one, call))
    if call.seed is not None:
        config = replace(config, cols=max(config.cols // 2, 16))
    return config, min(tangents, 1)


def backward_direction(direction: str, call: Call) -> str:
    """The direction, or "... masked" where the call has fewer scores and the table other tiles."""
    masked = f"{direction} masked"
    if call.mask is None and call.seed is None and not call.is_causal:
        return direction
    return masked if _has(key_of(masked, call)) else direction


def apart(call: Call) -> bool:
    """Whether the second order is launched as "first" for the tangents and "primal"."""
    return _has(key_of("primal query", call))


def key_of(direction: str, call: Call) -> Key:
    """The key of a call's kernel."""
    bits = 8 * call.query.element_size()
    dim = dim_class(call.query.shape[-1], call.value.shape[-1])
    return Key(direction, family(call.arch, bits), bits, dim)


def family(arch: int, bits: int = 16) -> int:
    """The architecture in the table whose tiles fit: same matrix units, no more shared memory.

    float32 tiles are limited by registers, and the same for all architectures.
    """
    return {90: 90, 100: 100, 103: 100}.get(arch, 80) if bits == 16 else 80


def dim_class(*dims: int) -> int:
    """The smallest of DIMS that every head dimension's tile fits into."""
    return next(size for size in DIMS if padded_dim(max(dims)) <= size)


def _has(key: Key) -> bool:
    return key in table() or key in _tuned


def tuned() -> Mapping[Key, Config]:
    """The configurations that replace those of the table."""
    return _tuned


def _lookup(key: Key) -> Config:
    return _tuned.get(key) or table()[key]


@contextlib.contextmanager
def using(key: Key, config: Config) -> Iterator[None]:
    """Context in which calls with ``key`` use ``config``."""
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
    """Configurations worth compiling, the most promising first; see :func:`cost`."""
    found = {}
    for rows, cols, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8)):
        owned, walked = (cols, rows) if kernel_of(key.direction) == "key value" else (rows, cols)
        registers = _least_registers(key, owned, walked, warps)
        limit, least = (176, 4 * warps) if key.bits == 16 else (40, 2 * warps)
        several = key.direction in ("forward x2", "forward x4")
        if registers <= limit and owned >= least and walked >= (32 if several else 16):
            stages = 2 if key.bits == 16 and key.dim <= 128 else 1
            blocks = 65536 / (32 * warps * min(registers + 48, 255))
            for stage in range(1, stages + 1):
                config = Config(rows, cols, warps, stage)
                found[config] = cost(key, config, blocks, owned >= 16 * warps)
    return sorted(found, key=found.__getitem__)


def cost(key: Key, config: Config, blocks: float, wide: bool) -> float:
    """Estimate the time per score, to rank configurations without a GPU.

    A program reads its own tile once, and the other operand once per tile, so larger tiles read
    less. Blocks that share a multiprocessor hide each other's latency; loading ahead hides a
    little. The matrix units of sm_90 and sm_100 need larger tiles.

    Args:
        key: key of the configuration.
        config: the configuration.
        blocks: blocks that fit onto a multiprocessor.
        wide: whether the kernel uses the matrix instructions of sm_90 or sm_100.
    """
    owned, walked = config.rows, config.cols
    if kernel_of(key.direction) == "key value":
        owned, walked = walked, owned
    if key.direction.endswith(" mask"):  # loads both
        owned = walked = min(owned, walked)
    reading = 1 + 32 / owned + 8 / walked
    waiting = (1 + 1 / min(max(int(blocks), 1), 3)) * (1.1 if config.num_stages == 1 else 1)
    return reading * waiting * (1 if wide or key.arch == 80 else 1.5)


def kernel_of(direction: str) -> str:
    """What a backward direction's gradients are by: "query", "key value" or "mask"."""
    return direction.partition(" ")[2].removesuffix(" masked")


def _least_registers(key: Key, owned: int, walked: int, warps: int) -> float:
    """Registers per thread for the sums and the tiles of scores."""
    order, _, rest = key.direction.partition(" ")
    if order == "forward":
        sums, scores = 1 + {"x2": 2, "x4": 4}.get(rest, 1), 3
    else:
        sums = {"query": 1, "key value": 2, "mask": 1}[kernel_of(key.direction)]
        sums *= 2 if order == "second" else 1
        scores = 2 if order == "first" else 3
    return (sums * owned * key.dim + scores * owned * walked) / (32 * warps)


def autotuning() -> bool:
    """Whether the user opted into tuning on first calls."""
    return os.environ.get("TANGENT_OPS_AUTOTUNE", "0").lower() in ("1", "true", "on", "yes")


def autotune(call: Call, directions: Iterable[str], run: Callable[[], object]) -> None:
    """Time the candidates of each direction on ``run``, once for each key, and keep the fastest.

    Nothing happens unless the user opted in and the call is on a GPU.
    """
    if not autotuning() or not _can_time(call):
        return
    for direction in directions:
        key = key_of(direction, call)
        if key in _tuned:
            continue
        default = table()[key]
        times = {}
        for config in dict.fromkeys([default, *candidates(key)[:TRIED]]):
            # A candidate may need more resources than the GPU has.
            with using(key, config), contextlib.suppress(TritonError, RuntimeError):
                times[config] = _seconds(call, run)
        _tuned[key] = min(times, key=times.__getitem__, default=default)


def forward_directions(call: Call, tangents: int) -> list[str]:
    """The directions whose tiles a forward pass with that many tangents uses."""
    if call.mask is not None:
        return ["forward masked"]
    found = []
    while tangents > 0 or not found:
        _, group = configure("forward", call, tangents)
        found.append(f"forward x{max(group, 1)}")
        tangents %= max(group, 1)
    return found


def _can_time(call: Call) -> bool:
    return call.query.is_cuda and not torch.cuda.is_current_stream_capturing()


def _seconds(call: Call, run: Callable[[], object]) -> float:
    """Of a run on the call's GPU. Its graph is freed at once: it holds the results of the run."""
    with device_of(call.query):
        (median,) = timing.medians([timing.capture_many([run])], rounds=10)
    return median
