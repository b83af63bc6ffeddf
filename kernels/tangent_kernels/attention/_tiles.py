"""Device functions shared by the attention kernels.

An operand is a tuple (pointer, strides over tangents, batch, heads and rows), as from
_launch.operand, or None for an absent tensor. A sixth element says that 8 divides the strides. The
length, and None, are compile-time constants and cost nothing.
"""

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
def at(operand, r, b, h):
    """(pointer, row stride) of the rows of one tangent, batch element and head; 64-bit indices."""
    if operand is None:
        rows = None
    else:
        r_stride = operand[1]
        b_stride = operand[2]
        h_stride = operand[3]
        row_stride = operand[4]
        if len(operand) == 6:
            # Triton detects only multiples of 16 itself, and then copies 16 bytes at a time. It
            # would copy heads of 72 one element at a time.
            r_stride = r_stride // 8 * 8
            b_stride = b_stride // 8 * 8
            h_stride = h_stride // 8 * 8
            row_stride = row_stride // 8 * 8
        rows = (operand[0] + r * r_stride + b * b_stride + h * h_stride, row_stride)
    return rows


@triton.jit
def mask_at(mask, strides, r, b, h):
    """(pointer, row stride, column stride) of the (N, M) part of a mask."""
    if mask is None:
        part = None
    else:
        part = (mask[0] + r * strides[0] + b * strides[1] + h * strides[2], strides[3], mask[1])
    return part


@triton.jit
def dropout_at(seed, b, head, dropout_p):
    """What :func:`kept` needs: the batch element's seed, the head, and the probability."""
    dropout = None
    if seed is not None:  # Triton 3.6 has no such conditional expression
        dropout = (tl.load(seed[0] + b * seed[1]), head.to(tl.int32), dropout_p)
    return dropout


@triton.jit
def load_rows(
    source,  # (pointer to row 0, elements between rows)
    first,  # index of the tile's first row
    limit,  # number of rows
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Rows ``first .. first + ROWS`` as a (ROWS, DIM_PAD) tile, 0 outside the tensor.

    With EDGE the tile may reach past the last row.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    # The tile's origin is a 64-bit scalar, so offsets inside the tile stay 32-bit vectors.
    base = source[0] + tl.cast(first, tl.int64) * source[1]
    pointers = base + (rows[:, None] * source[1] + dims[None, :])
    if EDGE:
        keep = (first + rows)[:, None] < limit
        if DIM_PAD != DIM:
            keep = keep & (dims < DIM)[None, :]
        return tl.load(pointers, mask=keep, other=0.0)
    if DIM_PAD != DIM:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def negated(tile):
    """-tile. Triton's interpreter cannot negate bfloat16."""
    return (-tile.to(tl.float32)).to(tile.dtype)


@triton.jit
def load_numbers(
    source,  # pointer to the number of row 0, contiguous
    first,
    limit,
    other,  # the number of rows outside the tensor
    ROWS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One number for each of the rows ``first .. first + ROWS``."""
    rows = first + tl.arange(0, ROWS)
    if EDGE:
        numbers = tl.load(source + rows, mask=rows < limit, other=other)
    else:
        numbers = tl.load(source + rows)
    return numbers


@triton.jit
def store_rows(
    target,  # (pointer to row 0, elements between rows)
    first,
    limit,
    tile,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Write the part of a (ROWS, DIM_PAD) tile that lies inside the tensor."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    base = target[0] + tl.cast(first, tl.int64) * target[1]
    keep = ((first + rows) < limit)[:, None] & (dims < DIM)[None, :]
    pointers = base + rows[:, None] * target[1] + dims[None, :]
    tl.store(pointers, tile.to(target[0].dtype.element_ty), mask=keep)


@triton.jit
def load_mask(
    mask,  # (pointer, row stride, column stride)
    rows,  # index tensors that broadcast to a tile
    cols,
    queries,
    keys,
    other,
):
    """Mask values at ``rows`` and ``cols``; ``other`` outside the tensor."""
    inside = (rows < queries) & (cols < keys)
    offsets = rows.to(tl.int64) * mask[1] + cols.to(tl.int64) * mask[2]
    return tl.load(mask[0] + offsets, mask=inside, other=other)


@triton.jit
def load_mask_tile(
    mask,  # (pointer, row stride, column stride), or None
    first_row,
    first_col,
    queries,
    keys,
    other,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A (ROWS, COLS) tile of mask values, or None; ``other`` past the last key.

    Past the last query it repeats that query's values. With EDGE it may pass the last key.
    """
    values = None
    if mask is not None:
        rows = tl.arange(0, ROWS)[:, None]
        cols = tl.arange(0, COLS)[None, :]
        rows = tl.minimum(rows, queries - 1 - first_row)
        base = mask[0] + tl.cast(first_row, tl.int64) * mask[1]
        base += tl.cast(first_col, tl.int64) * mask[2]
        pointers = base + (rows.to(tl.int64) * mask[1] + cols.to(tl.int64) * mask[2])
        if EDGE:
            values = tl.load(pointers, mask=first_col + cols < keys, other=other)
        else:
            values = tl.load(pointers)
    return values


@triton.jit
def plus_mask(
    scores,  # in units of log2 if the mask is additive; rows and cols broadcast to its shape
    values,  # of the mask, or None
    rows,  # indices of its queries
    cols,  # indices of its keys
    keys,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores plus the values of a mask, with -inf where a query may not attend."""
    if values is not None:
        if BOOLEAN:
            scores = tl.where(values != 0, scores, float("-inf"))
        else:
            scores += values.to(tl.float32) * LOG2_E
    if CAUSAL:
        scores = tl.where(cols <= rows, scores, float("-inf"))
    if EDGE:
        scores = tl.where(cols < keys, scores, float("-inf"))
    return scores


@triton.jit
def kept(dropout, rows, cols):
    """1 / (1 - p) where dropout keeps an attention weight, 0 where it drops it.

    Philox counts by head, query and key, so all kernels draw the same numbers for any tiles.
    """
    seed, head, p = dropout
    rows, cols = tl.broadcast(rows, cols)
    bits, _, _, _ = tl.philox(seed, cols, rows, head + rows * 0, rows * 0)
    return tl.where(tl.uint_to_uniform_float(bits) >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def zero_sums(wanted, ROWS: tl.constexpr, DIM_PAD: tl.constexpr):
    """Zeros to add to; a single one where the gradient is not needed."""
    if wanted is None:
        zeros = tl.zeros([1, 1], tl.float32)
    else:
        zeros = tl.zeros([ROWS, DIM_PAD], tl.float32)
    return zeros
