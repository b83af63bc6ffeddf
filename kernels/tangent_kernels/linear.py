"""The affine map and its tangent in one launch that reads x once.

y = x Wᵀ + b        y_t = x_t Wᵀ + x W_tᵀ + b_t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import FLOAT32_DOT, Launch, readable
from tangent_kernels._plan import run
from tangent_kernels.attention._tiles import dot

Optional = Tensor | None


@dataclass(frozen=True)
class ProductConfig:
    """Tile sizes and launch options of the product."""

    rows: int  # of x
    cols: int  # of W: output features
    depth: int  # input features per step
    num_warps: int
    num_stages: int

    def keywords(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "DEPTH": self.depth,
            "PRECISION": FLOAT32_DOT,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Two sums and four tiles: the largest that compiles without spills (tools.kernels.compile_kernels).
CONFIGS = {16: ProductConfig(64, 64, 64, 4, 3), 32: ProductConfig(32, 32, 16, 4, 2)}


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # (rows, K), unit last stride
    x_t,  # likewise, or None
    weight,  # (C, K), unit last stride
    weight_t,  # likewise, or None
    bias,  # (C,), or None
    bias_t,  # (C,), or None
    y,  # (rows, C), contiguous
    y_t,  # likewise
    x_stride,
    x_t_stride,
    weight_stride,
    weight_t_stride,
    rows,
    width,  # K
    features,  # C
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A ROWS x COLS tile of y and of y_t."""
    # Consecutive programs share rows of x; W, which is smaller, is read from L2.
    across = tl.cdiv(features, COLS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    # Rows and columns past the end read another row or column, and are not stored.
    from_row = (row % rows).to(tl.int64)[:, None]
    from_col = (col % features).to(tl.int64)[None, :]
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    total_t = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, DEPTH):
        line = start + depth
        inside = line < width
        left = tl.load(x + from_row * x_stride + line[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(
            weight + from_col * weight_stride + line[:, None], mask=inside[:, None], other=0.0
        )
        total = dot(left, right, total, PRECISION)
        if weight_t is not None:
            right_t = tl.load(
                weight_t + from_col * weight_t_stride + line[:, None],
                mask=inside[:, None],
                other=0.0,
            )
            total_t = dot(left, right_t, total_t, PRECISION)
        if x_t is not None:
            left_t = tl.load(
                x_t + from_row * x_t_stride + line[None, :], mask=inside[None, :], other=0.0
            )
            total_t = dot(left_t, right, total_t, PRECISION)
    if bias is not None:
        total += tl.load(bias + from_col).to(tl.float32)
    if bias_t is not None:
        total_t += tl.load(bias_t + from_col).to(tl.float32)
    keep = (row < rows)[:, None] & (col < features)[None, :]
    place = row.to(tl.int64)[:, None] * features + col[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=keep)
    tl.store(y_t + place, total_t.to(y_t.dtype.element_ty), mask=keep)


def linear_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Optional,
    x_t: Optional,
    weight_t: Optional,
    bias_t: Optional,
) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b and its tangent; products with an absent (None) tangent are not computed.

    Args:
        x: (..., K).
        weight: (C, K).
        bias: (C,) or None.
        x_t: tangent of ``x``; the same for the next two.
        weight_t: tangent of ``weight``.
        bias_t: tangent of ``bias``.

    Returns:
        Both (..., C), contiguous.
    """
    y, y_t = run(plan_jvp, (x, weight, bias, x_t, weight_t, bias_t))
    return y, y_t  # pyright: ignore[reportReturnType] - neither is None


def plan_jvp(x, weight, bias, x_t, weight_t, bias_t) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Empty results of :func:`linear_jvp` and the launch that fills them."""
    features, width = weight.shape
    shape = (*x.shape[:-1], features)
    y, y_t = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    matrices = {"x": x.reshape(-1, width), "x_t": x_t, "weight": weight, "weight_t": weight_t}
    if x_t is not None:
        matrices["x_t"] = x_t.reshape(-1, width)
    matrices = {name: readable(matrix) for name, matrix in matrices.items()}
    strides = {f"{n}_stride": 0 if m is None else m.stride(0) for n, m in matrices.items()}
    rows = y.numel() // features
    config = CONFIGS[8 * x.element_size()]
    arguments = {
        **matrices,
        "bias": None if bias is None else bias.contiguous(),
        "bias_t": None if bias_t is None else bias_t.contiguous(),
        "y": y,
        "y_t": y_t,
        **strides,
        "rows": rows,
        "width": width,
        "features": features,
    }
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(features, config.cols),)
    return (y, y_t), [Launch(linear_kernel, grid, arguments, config)]
