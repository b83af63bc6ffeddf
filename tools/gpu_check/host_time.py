"""The host's time per call of the ops on a GPU: small operands, so that the GPU waits for it."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops import functional as F

SHAPE = (2, 4, 197, 64)  # batch, heads, tokens, head dimension
CALLS, ROUNDS = 50, 30  # fewer calls than launches that fit into the GPU's queue


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    add = torch.ones(64, device="cuda")
    with forward_ad.dual_level():
        calls: dict[str, Callable[[], object]] = {"torch.add": lambda: add + add}
        for name, (op, operands) in _ops().items():
            calls |= _forward_and_backward(name, op, operands)
        found = _seconds(calls)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, seconds in found.items():
        print(f"{name:24}{1e6 * seconds:8.1f} µs{seconds / found['torch.add']:8.1f}")


def _ops() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Ops and their operands."""
    batch, heads, tokens, dim = SHAPE
    options = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    packed = torch.randn(batch, tokens, 3, heads, dim, **options).permute(2, 0, 3, 1, 4)
    rows = torch.randn(batch, tokens, heads * dim, **options)
    line = torch.randn(heads * dim, **options)
    return {
        "attention": (F.scaled_dot_product_attention, list(packed)),
        "layer norm": (lambda x, w, b: F.layer_norm(x, w.shape, w, b), [rows, line, line]),
        "gelu": (F.gelu, [rows]),
    }


def _forward_and_backward(
    name: str, op: Callable[..., Tensor], primals: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """The dual call, and the gradients of all its tangents by that of the output."""
    tangents = [torch.randn_like(one).requires_grad_() for one in primals]
    duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
    tangent = forward_ad.unpack_dual(op(*duals)).tangent
    assert tangent is not None
    grad = torch.randn_like(tangent)
    return {
        f"{name}, forward": lambda: op(*duals),
        f"{name}, backward": lambda: torch.autograd.grad(
            tangent, tangents, grad, retain_graph=True
        ),
    }


def _seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each call until it returns; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()  # compiles, in the first round
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
