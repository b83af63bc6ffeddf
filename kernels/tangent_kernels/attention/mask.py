"""Backward kernel by an additive mask and its tangent, summed over broadcast axes.

    grad_b_t = grad_S_t        grad_b = grad_S        (see backward.py)

One program owns a tile of the mask and sums over all scores the tile is broadcast to, so a bias
shared by a batch needs no (B, H, N, M) buffer and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tangent_kernels.attention._adjoint import adjoints, weights
from tangent_kernels.attention._tiles import (
    LOG2_E,
    at,
    dot,
    dropout_at,
    load_numbers,
    load_rows,
    mask_at,
)
from tangent_kernels.attention.backward import UNSPECIALIZED


@triton.jit
def _store_mask_tile(
    target,  # pointer to (N or 1, M or 1), contiguous
    tile,  # (ROWS, COLS)
    first_row,
    first_col,
    queries,
    keys,
    SUM_ROWS: tl.constexpr,
    SUM_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = first_row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    if SUM_ROWS and SUM_COLS:
        tl.store(target, tl.sum(tl.sum(tile, 1), 0))
    elif SUM_ROWS:
        tl.store(target + cols, tl.sum(tile, 0), mask=cols < keys)
    elif SUM_COLS:
        tl.store(target + rows, tl.sum(tile, 1), mask=rows < queries)
    else:
        pointers = target + rows.to(tl.int64)[:, None] * keys + cols[None, :]
        tl.store(pointers, tile, mask=(rows < queries)[:, None] & (cols < keys)[None, :])


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "mask_batch", "mask_heads"])
def grad_mask_kernel(
    q,  # see grad_query_kernel for the operands
    k,
    v,
    mask,
    mask_b,
    mask_h,
    mask_row,
    q_t,
    k_t,
    v_t,
    mask_t,
    mask_t_r,
    mask_t_b,
    mask_t_h,
    mask_t_row,
    seed,
    lse,
    mu,
    g,
    h,
    delta,  # (R, B, H, N) float32, written by grad_query_kernel
    epsilon,
    grad_mask,  # (R, mask_batch, mask_heads, N or 1, M or 1) float32 contiguous, or None
    grad_mask_t,  # likewise
    first_tangent,
    mask_batch,  # B or 1
    mask_heads,  # H or 1
    batch,
    heads,
    shared,
    queries,
    keys,
    scale,
    dropout_p,
    SUM_ROWS: tl.constexpr,  # whether the mask is broadcast along the queries
    SUM_COLS: tl.constexpr,  # or the keys
    SECOND: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program sums the gradient of one tile of the mask."""
    mask_strides = (0, mask_b, mask_h, mask_row)
    mask_t_strides = (mask_t_r, mask_t_b, mask_t_h, mask_t_row)
    all_row_tiles = tl.cdiv(queries, ROWS)
    all_col_tiles = tl.cdiv(keys, COLS)
    row_tiles = all_row_tiles
    col_tiles = all_col_tiles
    if SUM_ROWS:
        row_tiles = 1
    if SUM_COLS:
        col_tiles = 1
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = (program // col_tiles) % row_tiles
    mask_head = program // (col_tiles * row_tiles) % mask_heads
    mask_element = program // (col_tiles * row_tiles * mask_heads)
    r = (first_tangent + tl.program_id(1)).to(tl.int64)

    # The numbers of batch elements, heads, and row and column tiles the tile is broadcast to.
    over_batch = 1
    if mask_batch == 1:
        over_batch = batch
    over_heads = 1
    if mask_heads == 1:
        over_heads = heads
    over_rows = 1
    if SUM_ROWS:
        over_rows = all_row_tiles
    over_cols = 1
    if SUM_COLS:
        over_cols = all_col_tiles

    total = tl.zeros([ROWS, COLS], tl.float32)
    total_t = tl.zeros([ROWS, COLS], tl.float32)
    # A single loop, as in grad_key_value_kernel.
    for i in range(0, over_batch * over_heads * over_rows * over_cols):
        first_col = (col_tile + i % over_cols) * COLS
        first_row = (row_tile + i // over_cols % over_rows) * ROWS
        head32 = mask_head + i // (over_cols * over_rows) % over_heads
        b32 = mask_element + i // (over_cols * over_rows * over_heads)
        b = tl.cast(b32, tl.int64)
        head = tl.cast(head32, tl.int64)
        key_head = head // shared
        row_base = (b * heads + head) * queries
        tangent_base = r * batch * heads * queries + row_base
        mask_part = mask_at(mask, mask_strides, 0, b, head)
        dropout = dropout_at(seed, b, head, dropout_p)
        rows = first_row + tl.arange(0, ROWS)
        cols = first_col + tl.arange(0, COLS)
        # Each tile is loaded where it is first used: loading all at once would spill registers.
        q_tile = load_rows(at(q, 0, b, head), first_row, queries, ROWS, DIM, DIM_PAD, True)
        k_tile = load_rows(at(k, 0, b, key_head), first_col, keys, COLS, DIM, DIM_PAD, True)
        scores = dot(q_tile, k_tile.T, None, PRECISION)
        scores_t = None
        mu_tile = None
        epsilon_tile = None
        mask_t_part = None
        if SECOND:
            scores_t = tl.zeros([ROWS, COLS], tl.float32)
            if k_t is not None:
                k_t_rows = at(k_t, r, b, key_head)
                k_t_tile = load_rows(k_t_rows, first_col, keys, COLS, DIM, DIM_PAD, True)
                scores_t = dot(q_tile, k_t_tile.T, scores_t, PRECISION)
            if q_t is not None:
                q_t_rows = at(q_t, r, b, head)
                q_t_tile = load_rows(q_t_rows, first_row, queries, ROWS, DIM, DIM_PAD, True)
                scores_t = dot(q_t_tile, k_tile.T, scores_t, PRECISION)
        if SECOND:
            mask_t_part = mask_at(mask_t, mask_t_strides, r, b, head)
            if mu is not None:
                row_mu = load_numbers(mu + tangent_base, first_row, queries, 0.0, ROWS, True)
                mu_tile = row_mu[:, None]
        lse2 = load_numbers(lse + row_base, first_row, queries, 0.0, ROWS, True) * LOG2_E
        # The mask itself is -inf outside, so only the diagonal of a causal mask is checked.
        p, p_kept, _, centred, keep = weights(
            scores, scores_t, lse2[:, None], mu_tile, mask_part, mask_t_part, dropout,
            rows[:, None], cols[None, :], queries, keys, scale, CAUSAL, SECOND, BOOLEAN, CAUSAL,
        )  # fmt: skip
        h_tile = load_rows(at(h, r, b, head), first_row, queries, ROWS, DV, DV_PAD, True)
        v_tile = load_rows(at(v, 0, b, key_head), first_col, keys, COLS, DV, DV_PAD, True)
        grad_p = dot(h_tile, v_tile.T, None, PRECISION)
        delta_tile = load_numbers(delta + tangent_base, first_row, queries, 0.0, ROWS, True)
        if SECOND:
            epsilon_base = epsilon + tangent_base
            row_epsilon = load_numbers(epsilon_base, first_row, queries, 0.0, ROWS, True)
            epsilon_tile = row_epsilon[:, None]
        grad_s_t, grad_s = adjoints(
            p, centred, keep, mu, dropout, grad_p, delta_tile[:, None], epsilon_tile, SECOND
        )
        if SECOND and grad_mask is not None and (g is not None or v_t is not None):
            grad_p_t = tl.zeros([ROWS, COLS], tl.float32)
            if g is not None:
                g_rows = at(g, 0, b, head)
                g_tile = load_rows(g_rows, first_row, queries, ROWS, DV, DV_PAD, True)
                grad_p_t = dot(g_tile, v_tile.T, grad_p_t, PRECISION)
            if v_t is not None:
                v_t_rows = at(v_t, r, b, key_head)
                v_t_tile = load_rows(v_t_rows, first_col, keys, COLS, DV, DV_PAD, True)
                grad_p_t = dot(h_tile, v_t_tile.T, grad_p_t, PRECISION)
            grad_s += p_kept * grad_p_t
        if grad_mask is not None:
            total += grad_s
        if grad_mask_t is not None:
            total_t += grad_s_t

    height = queries
    width = keys
    if SUM_ROWS:
        height = 1
    if SUM_COLS:
        width = 1
    element = (r * mask_batch + mask_element) * mask_heads + mask_head
    offset = element * height * width
    if grad_mask is not None:
        _store_mask_tile(
            grad_mask + offset, total, row_tile * ROWS, col_tile * COLS, queries, keys,
            SUM_ROWS, SUM_COLS, ROWS, COLS,
        )  # fmt: skip
    if grad_mask_t is not None:
        _store_mask_tile(
            grad_mask_t + offset, total_t, row_tile * ROWS, col_tile * COLS, queries, keys,
            SUM_ROWS, SUM_COLS, ROWS, COLS,
        )  # fmt: skip
