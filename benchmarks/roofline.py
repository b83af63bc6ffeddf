"""The least work of each question, and the machine's limits.

FLOPs count products alone (a multiplication and an addition each): softmax and the like, of which
every provider has about as much, are left out. Bytes count every operand read once and every
result written once per pass, as a perfect fusion moves them. No provider is faster than such a
floor; a whole model, whose layers pass their results on through memory, cannot reach it.

A kind of call is "forward", or "step": forward and backward to inputs and parameters; of attention
"forward", "backward" and "second-order". A question is a provider's: "primal", "tangent" (value and
tangent), "finite-differences" (two primals). Unknown ones raise KeyError.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import DTYPES, Cost
from benchmarks.stored import Row

STATISTIC = 4  # bytes of a row statistic (lse, mean ...): float32 always

# Of attention: products of N x M x D, tensors of (B, H, N, D) moved, and statistics of (B, H, N)
# that the forward pass has saved.
ATTENTION = {
    ("forward", "primal"): (2, 4, 0),  # QKᵀ, PV
    ("forward", "tangent"): (6, 8, 0),
    ("forward", "finite-differences"): (4, 8, 0),
    ("backward", "primal"): (5, 8, 1),  # S again, HVᵀ, three gradients; q k v o do, dq dk dv; lse
    ("backward", "tangent"): (5, 8, 1),  # the same map
    ("second-order", "primal"): (5, 8, 1),
    # S, S_t (2), HVᵀ, GVᵀ + HV_tᵀ (2), and 1 + 2 for each of V, Q, K; q k v o, their tangents,
    # cotangents of o and o_t, six gradients; lse, mu.
    ("second-order", "tangent"): (15, 16, 2),
}

# Of an op on (rows, width): inputs of (rows, width); vectors of (width,); tensors that the backward
# pass reads beside the cotangent; gradients of (rows, width); statistics of a row; operations per
# element forward, for the tangent, backward (an erf or exp is one).
ROW_OPS = {
    "layer_norm": (1, 2, 1, 1, 2, (7, 11, 13)),
    "rms_norm": (1, 1, 1, 1, 1, (4, 8, 9)),
    "gelu": (1, 0, 1, 1, 0, (5, 7, 11)),
    "silu": (1, 0, 1, 1, 0, (4, 5, 8)),
    "softmax": (1, 0, 1, 1, 0, (5, 4, 4)),
}

# Of a copy that fits into no cache, the bytes; of a product, the rows and columns.
LARGE = {"cuda": (2**30, 8192), "cpu": (2**28, 1536)}


def attention_cost(
    kind: str, question: str, shape: tuple[int, ...], itemsize: int, causal: bool = False
) -> Cost:
    """Self-attention of shape (B, H, N, D); causal counts the N (N + 1) / 2 pairs not masked."""
    batch, heads, tokens, depth = shape
    products, tensors, statistics = ATTENTION[kind, question]
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    rows = batch * heads * tokens
    return Cost(
        flops=products * 2.0 * batch * heads * pairs * depth,
        bytes=float(tensors * rows * depth * itemsize + statistics * rows * STATISTIC),
    )


def linear_cost(kind: str, question: str, rows: int, inner: int, outer: int, itemsize: int) -> Cost:
    """y = x Wᵀ + b, of x (rows, inner) and W (outer, inner)."""
    product = 2.0 * rows * inner * outer
    operands = (rows * inner + outer * inner + outer) * itemsize  # as many bytes as their gradients
    output = rows * outer * itemsize
    read_again = (rows * inner + outer * inner) * itemsize
    return _asked(
        kind,
        question,
        forward=Cost(product, operands + output),
        dual=Cost(3 * product, 2 * (operands + output)),
        backward=Cost(2 * product, read_again + output + operands),
    )


def row_cost(op: str, kind: str, question: str, rows: int, width: int, itemsize: int) -> Cost:
    """An op of ROW_OPS on (rows, width)."""
    inputs, vectors, saved, gradients, statistics, operations = ROW_OPS[op]
    elements = rows * width
    forward, added, backward = (elements * one for one in operations)
    moved = ((inputs + 1) * elements + vectors * width) * itemsize
    weight = 1 if vectors else 0  # is read again; of a bias only the gradient is written
    moved_back = (saved + 1 + gradients) * elements + (weight + vectors) * width
    return _asked(
        kind,
        question,
        forward=Cost(forward, moved),
        dual=Cost(forward + added, 2 * moved),
        backward=Cost(backward, moved_back * itemsize + statistics * rows * STATISTIC),
    )


def model_cost(kind: str, question: str, forward: Cost) -> Cost:
    """A model with all its parameters trained, by the cost of its forward pass.

    Each product of the forward pass becomes three in a dual pass and two in a backward pass; that
    images have neither tangent nor gradient (1 % of a ViT-S) is not taken off. Bytes are those of
    the parameters alone: each read once per pass, its gradient written once.
    """
    dual = Cost(3 * forward.flops, 2 * forward.bytes)
    backward = Cost(2 * forward.flops, 2 * forward.bytes)
    return _asked(kind, question, forward, dual, backward)


def forward_cost(module: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """FLOPs of the products in `module`, attention's too, counted on the meta device; its bytes."""
    hollow = copy.deepcopy(module).to("meta")
    dtype = next(hollow.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow(torch.empty(input_shape, dtype=dtype, device="meta"))
    weights = sum(p.numel() * p.element_size() for p in hollow.parameters())
    return Cost(float(counter.get_total_flops()), float(weights))


def _asked(kind: str, question: str, forward: Cost, dual: Cost, backward: Cost) -> Cost:
    passes = {"primal": [forward], "tangent": [dual], "finite-differences": [forward] * 2}[question]
    passes += {"forward": [], "step": [backward]}[kind]
    return Cost(float(sum(p.flops for p in passes)), float(sum(p.bytes for p in passes)))


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches: the best of some large copies, and of some large matmuls.

    fp32 is measured as the cases run: at `torch.get_float32_matmul_precision()`, which is "highest"
    (on CUDA: no TF32) unless someone has set it.

    Returns:
        "bytes/s" (read plus written), and "flops/s fp32", "flops/s bf16", on CUDA "flops/s fp16".
    """
    size, side = LARGE[device.type]
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"bytes/s": 2 * size / _best(partial(torch.Tensor.copy_, target, source))}
    for name in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        one, other, out = (
            torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(3)
        )
        multiply = partial(torch.mm, one, other, out=out)
        found[f"flops/s {name}"] = 2.0 * side**3 / _best(multiply)
    return found


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call (or block of short calls) in half a second of them."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def percent_of_floor(row: Row, ceilings: Mapping[str, float]) -> float | None:
    """100 for a row as fast as the machine allows; None if time or limits are not known."""
    rate, bandwidth = ceilings.get(f"flops/s {row.case.dtype}"), ceilings.get("bytes/s")
    if row.seconds is None or rate is None or bandwidth is None:
        return None
    return 100 * max(row.bytes / bandwidth, row.flops / rate) / row.seconds
