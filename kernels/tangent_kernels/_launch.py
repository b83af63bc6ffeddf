"""What every launcher needs: devices, strides, and tile sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    rows: int  # queries in a tile
    cols: int  # keys in a tile
    num_warps: int
    num_stages: int

    def options(self, dim: int) -> dict:
        """The keyword arguments that every kernel's launch takes."""
        return {
            "DIM": dim,
            "DIM_PAD": padded_dim(dim),
            "ROWS": self.rows,
            "COLS": self.cols,
            "PRECISION": FLOAT32_DOT,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # pinned: Triton 3.10 changes the default
        }


# How float32 tiles are multiplied: three tf32 products, nearly float32's accuracy on tensor cores.
# Plain float32 (FMA) tiles spill kilobytes of registers. No effect on 16-bit tiles.
FLOAT32_DOT = "tf32x3"


def has_async_mma(tensor: Tensor) -> bool:
    """Whether matrix units read operands from shared memory (sm_90, sm_100), not registers."""
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current device, not the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def unit_last_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its last dimension is dense, else a copy that is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def outer_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and row of a (B, H, N, D) tensor; zeros for an absent one."""
    batch, head, row = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return batch, head, row


def empty_heads(batch: int, heads: int, rows: int, dim: int, like: Tensor) -> Tensor:
    """Uninitialised (B, H, N, D) whose ``transpose(1, 2).reshape(B, N, H * D)`` is a view."""
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)


def padded_dim(dim: int) -> int:
    """Width of a tile in registers: ``tl.arange`` wants a power of two, ``tl.dot`` at least 16."""
    return max(16, triton.next_power_of_2(dim))
