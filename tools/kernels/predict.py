"""Predict the time of attention's kernels on Hopper GPUs, from their machine code; no GPU needed.

    python -m tools.kernels.predict [--shapes 64,12,197,64 2,12,4096,64]

A kernel takes at least as long as the unit that it keeps busiest: memory, which reads every operand
and writes every result once, or one unit of a multiprocessor (`loop_costs.py`) in all iterations of
all blocks. Where ptxas serializes wgmma, issue and tensor clocks of a block follow each other. The
last wave of blocks, latency, and what comes before and after the loop are left out: a measured time
is longer, and one that is shorter proves the model wrong. Two times are for an H100 and an H200.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tangent_kernels.attention.configs import table
from tqdm import tqdm

from benchmarks.roofline import attention_cost
from tools.kernels.loop_costs import costs_of
from tools.kernels.resources import resources
from tools.kernels.samples import Case, launch_of

Shape = tuple[int, int, int, int]  # B, H, N, D

MULTIPROCESSORS = 132
CLOCK = 1.83e9  # Hz: 132 multiprocessors then reach the data sheets' 989 TFLOP/s in bfloat16
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, of the data sheets
SHAPES = ((64, 12, 197, 64), (8, 12, 1024, 64), (2, 12, 4096, 64), (64, 6, 197, 128))
ORDERS = {"forward": "forward", "first": "backward", "second": "second-order"}


@dataclass(frozen=True)
class Busy:
    """Seconds for which one kernel keeps a unit of the multiprocessors busy, at the least."""

    direction: str
    unit: str
    seconds: float


def busiest(direction: str, shape: Shape) -> Busy:
    """The busiest unit of a kernel for a call of shape (B, H, N, D) in bfloat16 on sm_90."""
    batch, heads, tokens, dim = shape
    case = Case(direction, 90, torch.bfloat16, dim, batch=batch, heads=heads, tokens=tokens)
    launch = launch_of(case)
    found = resources(launch, case.arch)
    loop = costs_of(case, found)
    assert loop is not None, f"{case.name} has no loop with matrix instructions"
    config = launch.config
    walked = config.rows if direction.endswith("key value") else config.cols
    iterations = math.prod(launch.grid) * math.ceil(tokens / walked)
    clocks = {
        "issue": loop.issue,
        "tensor": loop.tensor,
        "MUFU": loop.mufu,
        "ALU": loop.alu,
        "shared memory": loop.shared,
    }
    if found.serialized:
        clocks["issue, then tensor"] = loop.issue + loop.tensor
    unit = max(clocks, key=clocks.__getitem__)
    return Busy(direction, unit, iterations * clocks[unit] / MULTIPROCESSORS / CLOCK)


def directions_of(order: str, dim: int) -> Iterable[str]:
    """The kernels that a pass of this order launches for one tangent and no mask."""
    if order == "forward":
        return ["forward x1"]
    orders = [order]
    if order == "second" and Case("primal query", 90, torch.bfloat16, dim).key in table():
        orders = ["first", "primal"]  # launched apart: see configs.apart
    return [f"{one} {kernel}" for one in orders for kernel in ("query", "key value")]


def main() -> None:
    shapes = _parse()
    print("| B, H, N, D | pass | kernels, µs (busiest unit) | memory, µs | at least, µs |")
    print("|---|---|---|---|---|")
    passes = [(shape, order) for shape in shapes for order in ORDERS]
    for shape, order in tqdm(passes, "compiling", disable=None, leave=False):
        kernels = [busiest(one, shape) for one in directions_of(order, shape[3])]
        bytes_ = attention_cost(ORDERS[order], "tangent", shape, 2).bytes
        memory = [bytes_ / rate for rate in BANDWIDTH.values()]
        computing = sum(one.seconds for one in kernels)
        named = "; ".join(f"{one.direction} {_micro(one.seconds)} ({one.unit})" for one in kernels)
        least = ", ".join(_micro(max(computing, seconds)) for seconds in memory)
        moved = ", ".join(map(_micro, memory))
        print(f"| {', '.join(map(str, shape))} | {ORDERS[order]} | {named} | {moved} | {least} |")


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _parse() -> list[Shape]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, help="B,H,N,D")
    return parser.parse_args().shapes


def _shape(text: str) -> Shape:
    batch, heads, tokens, dim = map(int, text.split(","))
    return batch, heads, tokens, dim


if __name__ == "__main__":
    main()
