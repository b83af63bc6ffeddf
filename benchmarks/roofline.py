"""The least work that each question needs, the machine's limits, and what follows from both.

FLOPs count products alone (a multiplication and an addition each): softmax and the like, of which
every provider has about as much, are left out. Bytes count every operand read once and every
result written once per pass: what a perfect fusion moves. A floor is therefore one that nobody
goes below, and that a whole model, whose layers hand their results over in memory, cannot reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.suite.case import DTYPES, Cost
from benchmarks.suite.row import Row
from benchmarks.timing import interleave

STATISTIC = 4  # bytes of a row statistic (lse, mean ...): float32 always

# Products of N x M x D, of each question about attention.
ATTENTION_PRODUCTS = {
    "primal": 2,  # QKᵀ, PV
    "dual": 6,
    "finite-differences": 4,  # two primals
    "primal-backward": 5,  # S again; HVᵀ; gradients of V, Q, K
    "tangent-backward": 5,  # the same map
    "dual-backward": 15,  # S, S_t (2), HVᵀ, GVᵀ + HV_tᵀ (2), and 1 + 2 for each of V, Q, K
}
# What they move: tensors of (B, H, N, D), and statistics of (B, H, N) that the forward kept.
ATTENTION_TENSORS = {
    "primal": (4, 0),
    "dual": (8, 0),
    "finite-differences": (8, 0),
    "primal-backward": (8, 1),  # q k v o, do; dq dk dv; lse
    "tangent-backward": (8, 1),
    "dual-backward": (16, 2),  # q k v o, tangents, cotangents of o and o_t; 6 gradients; lse, mu
}


@dataclass(frozen=True)
class RowOp:
    """Least work of an op on (rows, width): what it moves, and operations per element.

    Attributes:
        inputs: of (rows, width).
        vectors: parameters of (width,).
        kept: tensors of (rows, width) that the backward pass reads beside the cotangent.
        gradients: of (rows, width), that it writes.
        statistics: of a row, that it finds.
        flops: forward, what the tangent adds, backward. An erf or exp is one.
    """

    inputs: int
    vectors: int
    kept: int
    gradients: int
    statistics: int
    flops: tuple[int, int, int]


ROW_OPS = {
    "layer_norm": RowOp(1, 2, 1, 1, 2, (7, 11, 13)),
    "rms_norm": RowOp(1, 1, 1, 1, 1, (4, 8, 9)),
    "gelu": RowOp(1, 0, 1, 1, 0, (5, 7, 11)),
    "silu": RowOp(1, 0, 1, 1, 0, (4, 5, 8)),
    "softmax": RowOp(1, 0, 1, 1, 0, (5, 4, 4)),
}


def attention_cost(
    question: str, shape: tuple[int, ...], itemsize: int, causal: bool = False
) -> Cost:
    """Self-attention.

    Args:
        question: a key of ATTENTION_PRODUCTS.
        shape: (B, H, N, D).
        itemsize: bytes of an element.
        causal: count the N (N + 1) / 2 pairs that are not masked.

    Raises:
        KeyError: an unknown question.
    """
    batch, heads, tokens, depth = shape
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    tensors, statistics = ATTENTION_TENSORS[question]
    rows = batch * heads * tokens
    return Cost(
        flops=ATTENTION_PRODUCTS[question] * 2.0 * batch * heads * pairs * depth,
        bytes=float(tensors * rows * depth * itemsize + statistics * rows * STATISTIC),
    )


def linear_cost(question: str, rows: int, inner: int, outer: int, itemsize: int) -> Cost:
    """y = x Wᵀ + b: "primal", "dual", "finite-differences", "ordinary-step" or "tangent-step".

    Args:
        question: a step is a forward and a backward pass, to input and parameters.
        rows: of x.
        inner: width of x.
        outer: width of y.
        itemsize: bytes of an element.

    Raises:
        KeyError: an unknown question.
    """
    product = 2.0 * rows * inner * outer
    operands = (rows * inner + outer * inner + outer) * itemsize  # as many bytes as their gradients
    output = rows * outer * itemsize
    read_again = (rows * inner + outer * inner) * itemsize
    return _asked(
        question,
        forward=Cost(product, operands + output),
        dual=Cost(3 * product, 2 * (operands + output)),
        backward=Cost(2 * product, read_again + output + operands),
    )


def row_cost(op: str, question: str, rows: int, width: int, itemsize: int) -> Cost:
    """An op on (rows, width); the questions are those of `linear_cost`.

    Args:
        op: a key of ROW_OPS.
        question: what is asked.
        rows: of each input.
        width: of each input.
        itemsize: bytes of an element.

    Raises:
        KeyError: an unknown op or question.
    """
    of = ROW_OPS[op]
    elements = rows * width
    forward, added, backward = (elements * operations for operations in of.flops)
    moved = ((of.inputs + 1) * elements + of.vectors * width) * itemsize
    weight = 1 if of.vectors else 0  # is read again; of a bias only the gradient is written
    moved_back = (of.kept + 1 + of.gradients) * elements + (weight + of.vectors) * width
    return _asked(
        question,
        forward=Cost(forward, moved),
        dual=Cost(forward + added, 2 * moved),
        backward=Cost(backward, moved_back * itemsize + of.statistics * rows * STATISTIC),
    )


def vit_cost(question: str, module: nn.Module, batch: int, image_size: int) -> Cost:
    """A whole model with all its parameters trained, by counting the products of one forward pass.

    Each product becomes three in a dual pass and two in a backward pass; that images have neither
    tangent nor gradient (1 % of a ViT-S) is not taken off. Bytes are those of the parameters alone:
    each read once per pass, its gradient written once.

    Args:
        question: as in `linear_cost`.
        module: takes (batch, 3, image_size, image_size); where it lies does not matter.
        batch: images.
        image_size: pixels.

    Raises:
        KeyError: an unknown question.
    """
    flops = forward_flops(module, (batch, 3, image_size, image_size))
    weights = float(sum(p.numel() * p.element_size() for p in module.parameters()))
    return _asked(
        question,
        forward=Cost(flops, weights),
        dual=Cost(3 * flops, 2 * weights),
        backward=Cost(2 * flops, 2 * weights),
    )


def forward_flops(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """FLOPs of the products in `module` of an input of that shape, attention's too.

    Nothing is computed: the pass runs on the meta device.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next(module.parameters()).dtype
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        functional_call(module, hollow, (torch.empty(input_shape, dtype=dtype, device="meta"),))
    return float(counter.get_total_flops())


def _asked(question: str, forward: Cost, dual: Cost, backward: Cost) -> Cost:
    parts = {
        "primal": (forward,),
        "dual": (dual,),
        "finite-differences": (forward, forward),
        "ordinary-step": (forward, backward),
        "tangent-step": (dual, backward),
    }[question]
    return Cost(float(sum(p.flops for p in parts)), float(sum(p.bytes for p in parts)))


# --- the machine ---------------------------------------------------------------------------------


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches: the best of some large copies, and of some large matmuls.

    fp32 is measured as the cases run: at `torch.get_float32_matmul_precision()`, which is "highest"
    (on CUDA: no TF32) unless someone has set it.

    Returns:
        "bytes/s" (read plus written), and "flops/s fp32", "flops/s bf16", on CUDA "flops/s fp16".
    """
    cuda = device.type == "cuda"
    size = 2**30 if cuda else 2**28  # bytes, out of any cache
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"bytes/s": 2 * size / _best(partial(torch.Tensor.copy_, target, source), device)}
    side = 8192 if cuda else 1536
    for name in ("fp32", "bf16", "fp16") if cuda else ("fp32", "bf16"):
        one, other, out = (
            torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(3)
        )
        multiply = partial(torch.mm, one, other, out=out)
        found[f"flops/s {name}"] = 2.0 * side**3 / _best(multiply, device)
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of at least three calls, half a second of them."""
    times = interleave({"call": [call]}, device=device, budget=0.5, rounds=(3, 50), warmup=1)
    return min(times["call"])


# --- what follows for a row ----------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What a measured time means on its machine.

    Attributes:
        seconds: the row's median.
        tflops: 1e12 of the least FLOPs per second.
        gigabytes: 1e9 of the least bytes per second.
        percent: the floor's part of the time; None if the machine's limits are not known.
        bound: by what the floor is set.
    """

    seconds: float
    tflops: float
    gigabytes: float
    percent: float | None
    bound: Literal["memory", "arithmetic"] | None


def figures(row: Row, ceilings: Mapping[str, float]) -> Figures | None:
    """The row's time in relation to the machine; None if it was not timed."""
    if row.seconds is None:
        return None
    percent, bound = None, None
    if (times := _floors(row, ceilings)) is not None:
        percent = 100 * max(times) / row.seconds
        bound = "memory" if times[0] > times[1] else "arithmetic"
    return Figures(
        row.seconds, row.flops / row.seconds / 1e12, row.bytes / row.seconds / 1e9, percent, bound
    )


def _floors(row: Row, ceilings: Mapping[str, float]) -> tuple[float, float] | None:
    """Seconds for the bytes, and for the operations."""
    rate = ceilings.get(f"flops/s {row.case.dtype}")
    if rate is None or "bytes/s" not in ceilings:
        return None
    return row.bytes / ceilings["bytes/s"], row.flops / rate
