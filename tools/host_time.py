"""Python's time per call of the dual ops, on a GPU or, without one, on the rehearsal.

    python -m tools.host_time               # on a CUDA device
    python -m tools.host_time --rehearse    # kernels are launched the real way, and nothing runs

A row is one op and direction. Forward is one call in a plain dual level, whose operands all have
tangents that require grad; backward is ``torch.autograd.grad`` of its tangent by theirs, after the
level. The columns are the median µs of this thread's CPU time per call, and the median ratio to
``torch.add`` of 64 elements, over rounds in which the rows take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tools import rehearsal

BATCH, HEADS, TOKENS, DIM = 2, 4, 197, 64
CALLS = 20  # of a row in a round: fewer launches than a GPU's queue holds


class Op(NamedTuple):
    """An op with its operands, and what its backward pass takes."""

    function: Callable[..., Tensor]
    primals: list[Tensor]
    tangents: list[Tensor]  # that require grad

    def duals(self) -> list[Tensor]:
        """Dual tensors of the active level."""
        return [
            forward_ad.make_dual(x, t) for x, t in zip(self.primals, self.tangents, strict=True)
        ]

    def backward(self) -> Callable[[], object]:
        """A backward pass that can be repeated."""
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(self.function(*self.duals())).tangent
        assert output is not None
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, self.tangents, grad, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a stand-in for a GPU")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON of the medians, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rehearse:
        rehearsal.start()
    times = _times(ops("cpu" if options.rehearse else "cuda"), options.rounds)
    if options.out:
        found = {name: statistics.median(seconds) for name, seconds in times.items()}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{'op':32}{'µs':>8}{'x torch.add':>13}")
    for name, seconds in times.items():
        ratios = [s / base for s, base in zip(seconds, times["torch.add"], strict=True)]
        print(f"{name:32}{1e6 * statistics.median(seconds):8.1f}{statistics.median(ratios):13.1f}")


def ops(device: str) -> dict[str, Op]:
    """The ops, at the shapes of a small ViT."""
    from tangent_ops import functional as F

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    def op(function: Callable[..., Tensor], *primals: Tensor) -> Op:
        return Op(function, list(primals), [torch.randn_like(x).requires_grad_() for x in primals])

    def packed() -> list[Tensor]:
        """Query, key and value as timm's layers slice them."""
        return list(random(BATCH, TOKENS, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0))

    width = HEADS * DIM
    tokens = random(BATCH, TOKENS, width)
    return {
        "attention": Op(
            F.scaled_dot_product_attention, packed(), [t.requires_grad_() for t in packed()]
        ),
        "layer norm": op(
            lambda x, w, b: F.layer_norm(x, (width,), w, b), tokens, random(width), random(width)
        ),
        "rms norm": op(lambda x, w: F.rms_norm(x, (width,), w), tokens, random(width)),
        "gelu": op(F.gelu, tokens),
        "softmax": op(lambda x: F.softmax(x, -1), tokens),
    }


def _times(chosen: dict[str, Op], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every row, one for each round; the first round compiles the kernels."""
    a = torch.ones(64, device=next(iter(chosen.values())).primals[0].device)
    backward = {f"{name}, backward": op.backward() for name, op in chosen.items()}
    for one in backward.values():
        one()
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        _add(times, {"torch.add": lambda: torch.add(a, a)})
        with forward_ad.dual_level():
            forward: dict[str, Any] = {}
            for name, op in chosen.items():
                forward[f"{name}, forward"] = _bound(op.function, op.duals())
            _add(times, forward)
        _add(times, backward)
    return times


def _bound(function: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: function(*operands)


def _add(times: dict[str, list[float]], rows: dict[str, Any]) -> None:
    for name, call in rows.items():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.setdefault(name, []).append((time.thread_time() - start) / CALLS)


if __name__ == "__main__":
    main()
