"""Python's time per call of the dual ops: kernels are launched the real way, and nothing runs.

    python -m tools.rehearsal.host_time

A row is one op and direction; the columns are µs per call and the ratio to ``torch.add`` of 64
elements, each the median over rounds in which all rows take turns. Kernels are compiled before.
Forward is one call in a plain dual level, all of whose operands have tangents that require grad;
backward is ``torch.autograd.grad`` of its tangent by theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tools import rehearsal

BATCH, HEADS, TOKENS, DIM = 2, 4, 197, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=20, help="of each row in a round")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rehearsal.start()
    a, b = torch.ones(64), torch.ones(64)
    rows: dict[str, Callable[[], object]] = {"torch.add": lambda: torch.add(a, b)}
    with forward_ad.dual_level():
        for name, (function, operands) in ops().items():
            rows |= cases(name, function, operands)
        times = _times(rows, chosen.rounds, chosen.calls)
    print(f"{'op':32}{'µs':>8}{'x torch.add':>13}")
    for name, seconds in times.items():
        ratios = [s / base for s, base in zip(seconds, times["torch.add"], strict=True)]
        print(f"{name:32}{1e6 * statistics.median(seconds):8.1f} {1e6*min(seconds):8.1f} {1e6*statistics.quantiles(seconds)[0]:8.1f} {1e6*statistics.quantiles(seconds)[2]:8.1f}{statistics.median(ratios):13.1f}")


def ops() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op and its operands."""
    from tangent_ops import functional as F

    kind: Any = {"dtype": torch.bfloat16}
    width = HEADS * DIM
    heads = torch.randn(BATCH, TOKENS, 3, HEADS, DIM, **kind).permute(2, 0, 3, 1, 4).unbind(0)
    tokens = torch.randn(BATCH, TOKENS, width, **kind)
    weight, bias = torch.randn(2, width, **kind).unbind(0)
    return {
        "attention": (F.scaled_dot_product_attention, list(heads)),
        "layer norm": (lambda x, w, b: F.layer_norm(x, (width,), w, b), [tokens, weight, bias]),
        "rms norm": (lambda x, w: F.rms_norm(x, (width,), w), [tokens, weight]),
        "gelu": (F.gelu, [tokens]),
        "softmax": (lambda x: F.softmax(x, -1), [tokens]),
    }


def cases(name: str, function: Callable[..., Tensor], primals: list[Tensor]) -> dict[str, Any]:
    """The forward and backward call of an op, each run once so that its kernels are compiled."""
    packed = torch.randn_like(torch.stack(primals)) if primals[0].ndim == 4 else None
    tangents = [torch.randn_like(x) for x in primals] if packed is None else list(packed)
    duals = [
        forward_ad.make_dual(x, t.detach().requires_grad_())
        for x, t in zip(primals, tangents, strict=True)
    ]
    leaves = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    output = forward_ad.unpack_dual(function(*duals)).tangent
    grad = torch.randn_like(output)

    def backward() -> object:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    backward()
    return {f"{name}, forward": lambda: function(*duals), f"{name}, backward": backward}


def _times(
    cases: dict[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Seconds per call of every case, one for each round."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.thread_time()
            for _ in range(calls):
                case()
            times[name].append((time.thread_time() - start) / calls)
    return times


if __name__ == "__main__":
    main()
