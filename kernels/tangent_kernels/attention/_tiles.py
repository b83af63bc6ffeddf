"""Device functions shared by the attention kernels."""

import triton
import triton.language as tl
from triton import knobs

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b (+ acc, unless None) in float32."""
    if INTERPRETED:
        # Triton's interpreter would multiply the raw bits of bfloat16. Products of 16-bit numbers
        # are exact in float32, so this computes what the hardware does.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(
    base,  # first element of row 0
    first,  # index of the tile's first row
    stride,  # elements between rows
    limit,  # number of rows
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows ``first .. first + ROWS`` as a (ROWS, DIM_PAD) tile; outside the tensor it is 0.

    CHECK says that the tile may reach past the last row.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    # The tile's origin is a 64-bit scalar, so offsets inside the tile stay 32-bit vectors.
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if CHECK:
        keep = (first + rows)[:, None] < limit
        if DIM_PAD != DIM:
            keep = keep & (dims < DIM)[None, :]
        return tl.load(pointers, mask=keep, other=0.0)
    if DIM_PAD != DIM:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(
    base,
    first,
    stride,
    limit,
    tile,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Write the part of a (ROWS, DIM_PAD) tile that lies inside the tensor."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    keep = ((first + rows) < limit)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep)
