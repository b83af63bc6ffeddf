"""Backward kernel by the query, and the formulas of all backward kernels.

With cotangents G of O and H of O_t (see kernels/README.md):

    δ = H·O        ε = G·O + H·O_t        A = H Vᵀ        B = G Vᵀ + H V_tᵀ
    grad_S_t = P∘(A - δ)                  grad_S = P∘(B - ε + (A - δ)∘(S_t - μ))
    grad_Q_t = s grad_S_t K               grad_Q = s (grad_S K + grad_S_t K_t)
    grad_K_t = s grad_S_tᵀ Q              grad_K = s (grad_Sᵀ Q + grad_S_tᵀ Q_t)
    grad_V_t = Pᵀ H                       grad_V = Pᵀ G + P_tᵀ H

The left column is the ordinary flash backward of O with cotangent H, because O_t is linear in the
tangents. "First order" means the left column alone, for any output and its cotangent; "primal"
means the right column alone.
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
    load_rows,
    mask_at,
    store_rows,
    zero_sums,
)

UNSPECIALIZED = [
    "mask_b", "mask_h", "mask_row", "mask_t_r", "mask_t_b", "mask_t_h", "mask_t_row",
    "first_tangent", "batch", "heads", "shared", "queries", "keys",
]  # fmt: skip


@triton.jit
def _grad_query_tile(
    first,  # index of the first key of this tile
    q,  # (ROWS, DIM_PAD)
    q_t,
    h,  # (ROWS, DV_PAD)
    g,
    lse2,  # (ROWS, 1), likewise the next three
    mu,
    delta,
    epsilon,
    acc,  # (ROWS, DIM_PAD), for grad_Q
    acc_t,  # (ROWS, DIM_PAD), for grad_Q_t
    k,  # rows (M, D)
    v,  # rows (M, DV)
    k_t,
    v_t,
    mask,
    mask_t,
    dropout,
    rows,  # (ROWS,)
    queries,
    keys,
    scale,
    checked,  # whether the tile may reach past the last key, or the diagonal of a causal mask
    SECOND: tl.constexpr,
    NEED: tl.constexpr,
    NEED_T: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of COLS keys to the sums of grad_Q and grad_Q_t."""
    cols = first + tl.arange(0, COLS)
    k_tile = load_rows(k, first, keys, COLS, DIM, DIM_PAD, True)
    v_tile = load_rows(v, first, keys, COLS, DV, DV_PAD, True)
    if SECOND:
        if k_t is not None:
            k_t_tile = load_rows(k_t, first, keys, COLS, DIM, DIM_PAD, True)
        if v_t is not None:
            v_t_tile = load_rows(v_t, first, keys, COLS, DV, DV_PAD, True)
    scores = dot(q, k_tile.T, None, PRECISION)
    scores_t = None
    if SECOND:
        scores_t = tl.zeros(scores.shape, tl.float32)
        if q_t is not None:
            scores_t = dot(q_t, k_tile.T, scores_t, PRECISION)
        if k_t is not None:
            scores_t = dot(q, k_t_tile.T, scores_t, PRECISION)
    p, p_kept, _, centred, keep = weights(
        scores, scores_t, lse2, mu, mask, mask_t, dropout, rows[:, None], cols[None, :],
        queries, keys, scale, checked, SECOND, BOOLEAN, CAUSAL,
    )  # fmt: skip
    grad_p = dot(h, v_tile.T, None, PRECISION)
    grad_s_t, grad_s = adjoints(p, centred, keep, mu, dropout, grad_p, delta, epsilon, SECOND)
    grad_s_t = grad_s_t.to(k_tile.dtype)
    if NEED_T:
        acc_t = dot(grad_s_t, k_tile, acc_t, PRECISION)
    if NEED:
        if SECOND and (g is not None or v_t is not None):
            grad_p_t = tl.zeros(scores.shape, tl.float32)
            if g is not None:
                grad_p_t = dot(g, v_tile.T, grad_p_t, PRECISION)
            if v_t is not None:
                grad_p_t = dot(h, v_t_tile.T, grad_p_t, PRECISION)
            grad_s += p_kept * grad_p_t
        if SECOND and k_t is not None:
            acc = dot(grad_s_t, k_t_tile, acc, PRECISION)
        acc = dot(grad_s.to(k_tile.dtype), k_tile, acc, PRECISION)
    return acc, acc_t


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_query_kernel(
    q,  # operand (B, H, N, D); last strides are 1
    k,  # operand (B, H / shared, M, D)
    v,  # operand (B, H / shared, M, DV)
    mask,  # (pointer, column stride) of (B, H, N, M), or None
    mask_b,  # its strides over batch elements, heads and rows
    mask_h,
    mask_row,
    q_t,  # tangents, (R, ...), or None; read with SECOND only
    k_t,
    v_t,
    mask_t,
    mask_t_r,
    mask_t_b,
    mask_t_h,
    mask_t_row,
    seed,  # (pointer to int64 (B,), stride), or None without dropout
    o,  # operand (B, H, N, DV)
    o_t,  # operand (R, B, H, N, DV), with SECOND
    lse,  # (B, H, N) float32
    mu,  # (R, B, H, N) float32 with SECOND, None where the scores have no tangent
    g,  # operand (B, H, N, DV), or None
    h,  # operand (R, B, H, N, DV)
    delta,  # (R, B, H, N) float32, written here
    epsilon,  # likewise with SECOND
    grad_q,  # operand (R, B, H, N, D) or None: written if needed
    grad_q_t,  # operand (R, B, H, N, D) or None
    first_tangent,  # of this launch
    batch,
    heads,
    shared,  # query heads for each key head
    queries,
    keys,
    scale,
    dropout_p,
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
    """One program computes δ and ε, and grad_Q and grad_Q_t if needed, of ROWS query rows."""
    mask_strides = (0, mask_b, mask_h, mask_row)
    mask_t_strides = (mask_t_r, mask_t_b, mask_t_h, mask_t_row)
    row_tiles = tl.cdiv(queries, ROWS)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    batch_head = tl.program_id(0) // row_tiles
    r = (first_tangent + tl.program_id(1)).to(tl.int64)
    b = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < queries
    row_base = tl.cast(batch_head, tl.int64) * queries
    tangent_base = r * batch * heads * queries + row_base

    o_tile = load_rows(at(o, 0, b, head), first_row, queries, ROWS, DV, DV_PAD, True)
    h_tile = load_rows(at(h, r, b, head), first_row, queries, ROWS, DV, DV_PAD, True)
    delta_tile = tl.sum(o_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
    tl.store(delta + tangent_base + rows, delta_tile, mask=inside)
    g_tile = None
    epsilon_tile = None
    if SECOND:
        o_t_tile = load_rows(at(o_t, r, b, head), first_row, queries, ROWS, DV, DV_PAD, True)
        sums = tl.sum(o_t_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
        if g is not None:
            g_tile = load_rows(at(g, 0, b, head), first_row, queries, ROWS, DV, DV_PAD, True)
            sums += tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
        tl.store(epsilon + tangent_base + rows, sums, mask=inside)
        epsilon_tile = sums[:, None]

    if grad_q is not None or grad_q_t is not None:
        key_head = head // shared
        q_tile = load_rows(at(q, 0, b, head), first_row, queries, ROWS, DIM, DIM_PAD, True)
        q_t_tile = None
        mu_tile = None
        k_t_rows = None
        v_t_rows = None
        mask_t_part = None
        if SECOND:
            if q_t is not None:
                q_t_rows = at(q_t, r, b, head)
                q_t_tile = load_rows(q_t_rows, first_row, queries, ROWS, DIM, DIM_PAD, True)
            if mu is not None:
                mu_tile = tl.load(mu + tangent_base + rows, mask=inside, other=0.0)[:, None]
            k_t_rows = at(k_t, r, b, key_head)
            v_t_rows = at(v_t, r, b, key_head)
            mask_t_part = mask_at(mask_t, mask_t_strides, r, b, head)
        # P of rows past the end is 0.
        lse2 = tl.load(lse + row_base + rows, mask=inside, other=float("inf")) * LOG2_E
        k_rows = at(k, 0, b, key_head)
        v_rows = at(v, 0, b, key_head)
        mask_part = mask_at(mask, mask_strides, 0, b, head)
        dropout = dropout_at(seed, b, head, dropout_p)
        acc = zero_sums(grad_q, ROWS, DIM_PAD)
        acc_t = zero_sums(grad_q_t, ROWS, DIM_PAD)
        stop = keys
        checked = keys - COLS + 1  # tiles from here on need index checks
        if CAUSAL:
            stop = tl.minimum(keys, first_row + ROWS)
            checked = tl.minimum(checked, first_row - COLS + 2)
        for first in range(0, stop, COLS):
            acc, acc_t = _grad_query_tile(
                first, q_tile, q_t_tile, h_tile, g_tile, lse2[:, None], mu_tile,
                delta_tile[:, None], epsilon_tile, acc, acc_t, k_rows, v_rows, k_t_rows, v_t_rows,
                mask_part, mask_t_part, dropout, rows, queries, keys, scale, first >= checked,
                SECOND, grad_q is not None, grad_q_t is not None, BOOLEAN, CAUSAL,
                DIM, DIM_PAD, DV, DV_PAD, COLS, PRECISION,
            )  # fmt: skip
        if grad_q is not None:
            target = at(grad_q, r, b, head)
            store_rows(target, first_row, queries, acc * scale, ROWS, DIM, DIM_PAD)
        if grad_q_t is not None:
            target = at(grad_q_t, r, b, head)
            store_rows(target, first_row, queries, acc_t * scale, ROWS, DIM, DIM_PAD)
