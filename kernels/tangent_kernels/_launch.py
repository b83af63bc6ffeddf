"""Helpers for launchers: tile configurations, launches as values, operands as kernel arguments."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# float32 tiles are multiplied by three tf32 products: nearly float32's accuracy, on tensor cores.
# Plain float32 (FMA) tiles spill kilobytes of registers. 16-bit tiles ignore this.
FLOAT32_DOT = "tf32x3"

DEFAULT_ARCH = 90  # the tiles to use in the interpreter on a CPU

MAX_ROWS = 128  # of a tile

MAX_GROUPS = 65_535  # programs along grid axis 1: CUDA's limit; axis 0 takes 2^31 - 1


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of a kernel that multiplies matrices."""

    rows: int  # queries in a tile
    cols: int  # keys in a tile
    num_warps: int
    num_stages: int

    def keywords(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "PRECISION": FLOAT32_DOT,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run; the compile-only check compiles it instead."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameter names
    config: Any  # Config, or another class with keywords() and num_warps
    scratch: tuple[Tensor, ...] = ()  # arguments that are neither operands nor results

    def keywords(self) -> dict[str, Any]:
        """All arguments of the kernel."""
        # enable_fp_fusion is pinned: Triton 3.10 changes the default
        return self.arguments | self.config.keywords() | {"enable_fp_fusion": True}

    def run(self) -> Any:
        """Run, and return what Triton returns: the compiled kernel, unless it is interpreted."""
        return self.kernel[self.grid](**self.keywords())


def in_chunks(launch: Launch) -> list[Launch]:
    """The launch of one tangent per program along grid axis 1, in parts that CUDA accepts."""
    tiles, count = launch.grid
    if count <= MAX_GROUPS:
        return [launch]
    first = launch.arguments["first_tangent"]
    return [
        replace(
            launch,
            grid=(tiles, min(MAX_GROUPS, count - done)),
            arguments=launch.arguments | {"first_tangent": first + done},
        )
        for done in range(0, count, MAX_GROUPS)
    ]


def arch_of(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, as 10 * major + minor."""
    if not tensor.is_cuda:
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current device, not the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def readable(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` itself if kernels can read its rows in place, else a contiguous copy.

    They need a last stride of 1, and offsets within a tile of rows that fit into 32 bits.
    """
    if tensor is None:
        return None
    unit = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    far = tensor.ndim > 1 and MAX_ROWS * tensor.stride(-2) >= 2**31
    return tensor if unit and not far else tensor.contiguous()


def operand(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A (B, H, N, D) or (R, B, H, N, D) tensor as a kernel argument.

    Returns:
        The tensor, its strides over tangents (0 without that axis), batch, heads and rows, and one
        more 0 if these are all multiples of 8. None for an absent tensor.
    """
    if tensor is None:
        return None
    strides = tensor.stride()[:-1]
    strides = (0, *strides) if len(strides) == 3 else strides
    # A None at the end would do, but Triton 3.6 compiles no None within a tuple.
    return (tensor, *strides) if any(stride % 8 for stride in strides) else (tensor, *strides, 0)


def empty_heads(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (..., H, N, D) whose ``transpose(-3, -2).flatten(-2)`` is a view.

    The result itself is not a view: PyTorch's forward mode restricts tangents of views.
    """
    *lead, heads, rows, dim = range(len(shape))
    order = (*lead, rows, heads, dim)
    return torch.empty_permuted(shape, order, dtype=dtype or like.dtype, device=like.device)


def padded_dim(dim: int) -> int:
    """Width of a tile: ``tl.arange`` requires a power of two and ``tl.dot`` at least 16."""
    return max(16, 1 << (dim - 1).bit_length())
