"""Launch every kernel once on small tensors, for compute-sanitizer.

    compute-sanitizer --tool memcheck python3 -m tools.kernels.sanitize_kernels
    compute-sanitizer --tool racecheck python3 -m tools.kernels.sanitize_kernels

Lengths end inside a tile, so that an access past the end is one past an allocation.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
)
from torch import Tensor

from tools.kernels.row_samples import launches

QUERIES, KEYS = 70, 53
ROWS = 37


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for dtype, dim in itertools.product((torch.float16, torch.float32), (8, 64, 72, 128, 256)):
        launch_all(dim, dtype, device, mask="none")
    for mask in ("additive", "boolean", "causal", "dropout"):
        launch_all(64, torch.float16, device, mask)
    for dtype, width in itertools.product((torch.float16, torch.float32), (8, 70, 384)):
        launch_rows(width, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel launched, every result finite")


def launch_all(dim: int, dtype: torch.dtype, device: str, mask: str) -> None:
    """Forward with 1 and 3 tangents, first and second order backward; 2 query heads to a key's."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    query, key, value = draw(1, 4, QUERIES, dim), draw(1, 2, KEYS, dim), draw(1, 2, KEYS, dim)
    masks = {
        "additive": draw(1, 4, QUERIES, KEYS),
        "boolean": draw(1, 1, QUERIES, KEYS) > -1,
    }
    seed = torch.ones(1, dtype=torch.int64, device=device) if mask == "dropout" else None
    dropout_p = 0.1 if mask == "dropout" else 0.0
    bias = masks.get(mask)
    call = Call(query, key, value, bias, seed, dim**-0.5, dropout_p, mask == "causal")
    for count in (1, 3):
        query_t, key_t, value_t = (draw(count, *x.shape) for x in (query, key, value))
        mask_t = draw(count, *bias.shape) if bias is not None and mask == "additive" else None
        tangents = Tangents(call, query_t, key_t, value_t, mask_t)
        output, output_t, lse, mu = attention_jvp(call, query_t, key_t, value_t, mask_t)
        needs = (True, True, True, mask == "additive")
        grad, grad_t = draw(*output.shape), draw(*output_t.shape)
        first = attention_vjp(call, output, lse, grad_t, needs)
        second = attention_second_vjp(
            call, tangents, output, output_t, lse, mu, grad, grad_t, needs, needs
        )
        for result in (output, output_t, *first, *second[0], *second[1]):
            assert result is None or result.isfinite().all()


def launch_rows(width: int, dtype: torch.dtype, device: str) -> None:
    """Norms, activations, softmax and linear, forward and backward, with all their operands."""
    for name, launch in launches(width, dtype, ROWS, device).items():
        launch.run()
        for argument in launch.arguments.values():
            tensor = argument[0] if isinstance(argument, tuple) else argument
            if isinstance(tensor, Tensor):
                assert tensor.isfinite().all(), name


if __name__ == "__main__":
    main()
