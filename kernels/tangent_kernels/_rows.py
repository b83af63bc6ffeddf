"""Tiles of whole rows, shared by the kernels of norms, softmax and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 4096  # elements of a row that one program holds
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class RowConfig:
    """Tile sizes and launch options of a kernel that owns whole rows."""

    rows: int  # in a tile
    width: int  # of a tile: a power of two
    num_warps: int

    def keywords(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {
            "ROWS": self.rows,
            "WIDTH": self.width,
            "num_warps": self.num_warps,
            "num_stages": 1,
        }


def row_config(width: int, held: int) -> RowConfig:
    """Tiles for rows of ``width`` elements.

    Args:
        width: elements in a row.
        held: elements of one operand per thread; fewer for kernels with more operands.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    rows = max(1, 128 * held // padded)
    threads = rows * padded // held
    return RowConfig(rows, padded, max(4, min(32, threads // 32)))


def as_rows(tensor: Tensor, width: int) -> Tensor:
    """(rows, width) with a unit last stride: a view where strides allow, else a copy."""
    flat = tensor.reshape(-1, width)
    return flat if flat.stride(1) == 1 or width == 1 else flat.contiguous()


def row_operand(tensor: Tensor | None, width: int) -> tuple[Any, ...] | None:
    """A tensor as a kernel argument: its (rows, width) view or copy, and the row stride."""
    if tensor is None:
        return None
    flat = as_rows(tensor, width)
    return flat, flat.stride(0)


@triton.jit
def load_row(operand, row, cols, inside, other=0.0):
    """Load from an operand ((rows, K), row stride), in float32."""
    return tl.load(operand[0] + row * operand[1] + cols, mask=inside, other=other).to(tl.float32)


@triton.jit
def store_row(operand, row, cols, value, inside):
    """Store to such an operand, rounded to its dtype."""
    pointer = operand[0] + row * operand[1] + cols
    tl.store(pointer, value.to(operand[0].dtype.element_ty), mask=inside)
