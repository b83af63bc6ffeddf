"""The host's time per call of the ops on a GPU: small operands, so that the GPU waits for it."""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
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
    found = {name: statistics.median(times) for name, times in measured().items()}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, seconds in found.items():
        print(f"{name:24}{1e6 * seconds:8.1f} µs{seconds / found['torch.add']:8.1f}")


def measured() -> dict[str, list[float]]:
    """Seconds until a call returns, in every round; calls take turns.

    Forward is a call in a dual level whose operands all have tangents that require gradients;
    backward gives their gradients, after the level.
    """
    add = torch.ones(64, device="cuda")
    operands = {
        name: (op, primals, [torch.randn_like(one).requires_grad_() for one in primals])
        for name, (op, primals) in _ops().items()
    }
    backward = {name: _backward(*one) for name, one in operands.items()}
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(ROUNDS):
        times["torch.add"].append(_seconds(lambda: add + add))
        for name, (op, primals, tangents) in operands.items():
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(*one) for one in zip(primals, tangents, strict=True)]
                times[f"{name}, forward"].append(_seconds(partial(op, *duals)))
            times[f"{name}, backward"].append(_seconds(backward[name]))
    return times


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


def _backward(
    op: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]
) -> Callable[[], object]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*one) for one in zip(primals, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(op(*duals)).tangent
    assert tangent is not None
    grad = torch.randn_like(tangent)
    return lambda: torch.autograd.grad(tangent, tangents, grad, retain_graph=True)


def _seconds(call: Callable[[], object]) -> float:
    call()  # compiles, at the first time
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    main()
