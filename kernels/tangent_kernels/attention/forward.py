"""Forward kernel: attention and its tangents in one online-softmax pass.

For each row i, over key tiles j, these sums share one rescaling by the running maximum:

    l = Σ p        acc = Σ p v        acc_t = Σ p (S_t - μ) v + p v_t        p = exp(S - max S)

    O = acc / l        O_t = acc_t / l        lse = max S + log l        μ = Σ p S_t / l

μ is the running mean of S_t: when a tile changes it by Δ, Δ acc is subtracted from acc_t. So the
factor that is rounded to 16 bit before a product is p (S_t - μ), after its large parts cancelled.

R tangents of one primal share its loads, scores and softmax: 2 + 4R products per tile, not 6R.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import (
    MAX_GROUPS,
    Launch,
    empty_heads,
    operand,
    padded_dim,
)
from tangent_kernels._plan import run, run_launches
from tangent_kernels.attention._call import Call, Tangents
from tangent_kernels.attention._tiles import (
    LOG2_E,
    at,
    dot,
    dropout_at,
    kept,
    load_mask_tile,
    load_rows,
    mask_at,
    negated,
    plus_mask,
    store_rows,
)
from tangent_kernels.attention.configs import (
    autotune,
    autotuning,
    configure,
    forward_directions,
    tuned,
)


@triton.jit
def _accumulate(
    first,  # index of the first key of this tile
    q,  # (ROWS, DIM_PAD)
    q_t,  # tuple of (ROWS, DIM_PAD), one for each tangent, or None
    acc,  # (ROWS, DV_PAD)
    acc_t,  # tuple of (ROWS, DV_PAD)
    row_max,  # (ROWS,), in units of log2
    row_sum,  # (ROWS,)
    mu,  # tuple of (ROWS,), the mean of S_t so far
    k,  # rows (M, D), likewise below: (pointer, row stride)
    v,  # (M, DV)
    k_t,  # tuple of (M, D), or None
    v_t,  # tuple of (M, DV), or None
    mask,  # (N, M): (pointer, row stride, column stride), or None
    mask_t,  # tuple of (N, M), or None
    dropout,  # as kept takes it, or None
    first_row,
    queries,
    keys,
    scale,  # not negative
    TANGENTS: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of COLS keys into the running sums."""
    rows = first_row + tl.arange(0, ROWS)
    cols = first + tl.arange(0, COLS)
    # Masks are loaded before the first product: then Triton computes in the product's layout, not
    # in the masks'.
    other = 0 if BOOLEAN else float("-inf")
    values = load_mask_tile(mask, first_row, first, queries, keys, other, ROWS, COLS, EDGE)
    values_t = ()
    if mask_t is not None:
        for r in tl.static_range(TANGENTS):
            values_t = values_t + (
                load_mask_tile(mask_t[r], first_row, first, queries, keys, 0.0, ROWS, COLS, EDGE),
            )
    k_tile = load_rows(k, first, keys, COLS, DIM, DIM_PAD, EDGE)
    v_tile = load_rows(v, first, keys, COLS, DV, DV_PAD, EDGE)
    scores = dot(q, k_tile.T, None, PRECISION)
    # The products are scaled in the exponents alone, and only the largest one of each row apart. A
    # scale of 0 becomes nearly 0, because -inf * 0 is NaN.
    unit = tl.maximum(scale * LOG2_E, 1e-30)
    if mask is not None and not BOOLEAN:
        scores *= unit
        unit = 1.0
    scores = plus_mask(scores, values, rows[:, None], cols[None, :], keys, BOOLEAN, CAUSAL, EDGE)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)  # pyright: ignore[reportOperatorIssue]
    origin = new_max
    if mask is not None:  # a row masked so far: -inf - -inf would be NaN
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * unit - origin[:, None])
    decay = tl.exp2(row_max - origin)
    row_sum = row_sum * decay + tl.sum(p, 1)
    total = row_sum
    if mask is not None:
        total = tl.where(row_sum > 0.0, row_sum, 1.0)
    inverse = 1.0 / total
    acc = acc * decay[:, None]
    weights = p
    if dropout is not None:
        keep = kept(dropout, rows[:, None], cols[None, :])
        weights = p * keep
    weights = weights.to(v_tile.dtype)

    new_acc_t = ()
    new_mu = ()
    for r in tl.static_range(TANGENTS):
        sum_t = acc_t[r] * decay[:, None]
        mean = mu[r]
        if q_t is not None or k_t is not None or mask_t is not None:
            scores_t = tl.zeros([ROWS, COLS], tl.float32)
            if q_t is not None:
                scores_t = dot(q_t[r], k_tile.T, scores_t, PRECISION)
            if k_t is not None:
                k_t_tile = load_rows(k_t[r], first, keys, COLS, DIM, DIM_PAD, EDGE)
                scores_t = dot(q, k_t_tile.T, scores_t, PRECISION)
            scores_t *= scale
            if mask_t is not None:
                scores_t += tl.cast(values_t[r], tl.float32)
            weights_t = p * (scores_t - mean[:, None])
            step = tl.sum(weights_t, 1) * inverse
            mean = mean + step
            weights_t -= p * step[:, None]
            if dropout is not None:
                weights_t *= keep
            sum_t -= step[:, None] * acc
            weights_t = weights_t.to(v_tile.dtype)
            sum_t = dot(weights_t, v_tile, sum_t, PRECISION)
        if v_t is not None:
            v_t_tile = load_rows(v_t[r], first, keys, COLS, DV, DV_PAD, EDGE)
            sum_t = dot(weights, v_t_tile, sum_t, PRECISION)
        new_acc_t = new_acc_t + (sum_t,)
        new_mu = new_mu + (mean,)
    acc = dot(weights, v_tile, acc, PRECISION)
    return acc, new_acc_t, new_max, row_sum, new_mu


@triton.jit(
    do_not_specialize=[
        "mask_b", "mask_h", "mask_row", "mask_t_r", "mask_t_b", "mask_t_h", "mask_t_row",
        "first_tangent", "batch", "heads", "shared", "queries", "keys",
    ]
)  # fmt: skip
def attention_jvp_kernel(
    q,  # operand (B, H, N, D); last strides are 1
    k,  # operand (B, H / shared, M, D)
    v,  # operand (B, H / shared, M, DV)
    mask,  # (pointer, column stride) of (B, H, N, M), or None
    mask_b,  # its strides over batch elements, heads and rows
    mask_h,
    mask_row,
    q_t,  # operand (R, B, H, N, D), or None
    k_t,  # operand (R, B, H / shared, M, D), or None
    v_t,  # operand (R, B, H / shared, M, DV), or None
    mask_t,  # (pointer, column stride) of (R, B, H, N, M), or None
    mask_t_r,
    mask_t_b,
    mask_t_h,
    mask_t_row,
    seed,  # (pointer to int64 (B,), stride), or None without dropout
    o,  # operand (B, H, N, DV), or None where another launch writes it
    o_t,  # operand (R, B, H, N, DV), or None without tangents
    lse,  # (B, H, N) float32, natural logarithm; +inf for a fully masked row; or None
    mu,  # (R, B, H, N) float32, or None
    first_tangent,  # of this launch
    batch,
    heads,
    shared,  # query heads for each key head
    queries,
    keys,
    scale,
    dropout_p,
    TANGENTS: tl.constexpr,  # in one program
    NEGATIVE: tl.constexpr,  # whether scale < 0
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
    """One program computes ROWS query rows of one batch element and head, and TANGENTS tangents."""
    mask_strides = (0, mask_b, mask_h, mask_row)
    mask_t_strides = (mask_t_r, mask_t_b, mask_t_h, mask_t_row)
    row_tiles = tl.cdiv(queries, ROWS)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    batch_head = tl.program_id(0) // row_tiles
    r0 = (first_tangent + tl.program_id(1) * TANGENTS).to(tl.int64)
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    key_head = h // shared

    q_tile = load_rows(at(q, 0, b, h), first_row, queries, ROWS, DIM, DIM_PAD, True)
    k_rows = at(k, 0, b, key_head)
    v_rows = at(v, 0, b, key_head)
    mask_part = mask_at(mask, mask_strides, 0, b, h)
    dropout = dropout_at(seed, b, h, dropout_p)

    q_ts = None
    k_ts = None
    v_ts = None
    mask_ts = None
    if q_t is not None:
        q_ts = ()
    if k_t is not None:
        k_ts = ()
    if v_t is not None:
        v_ts = ()
    if mask_t is not None:
        mask_ts = ()
    if NEGATIVE:  # scale q k = -scale (-q) k
        q_tile = negated(q_tile)
        scale = -scale
    acc_t = ()
    means = ()
    for r in tl.static_range(TANGENTS):
        if q_t is not None:
            q_t_rows = at(q_t, r0 + r, b, h)
            q_t_tile = load_rows(q_t_rows, first_row, queries, ROWS, DIM, DIM_PAD, True)
            if NEGATIVE:
                q_t_tile = negated(q_t_tile)
            q_ts = q_ts + (q_t_tile,)
        if k_t is not None:
            k_ts = k_ts + (at(k_t, r0 + r, b, key_head),)
        if v_t is not None:
            v_ts = v_ts + (at(v_t, r0 + r, b, key_head),)
        if mask_t is not None:
            mask_ts = mask_ts + (mask_at(mask_t, mask_t_strides, r0 + r, b, h),)
        acc_t = acc_t + (tl.zeros([ROWS, DV_PAD], tl.float32),)
        means = means + (tl.zeros([ROWS], tl.float32),)

    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    whole = (keys // COLS) * COLS  # keys in tiles that need no index checks
    stop = keys
    if CAUSAL:
        whole = (tl.minimum(keys, first_row + 1) // COLS) * COLS
        stop = tl.minimum(keys, first_row + ROWS)
    for first in range(0, whole, COLS):
        acc, acc_t, row_max, row_sum, means = _accumulate(
            first, q_tile, q_ts, acc, acc_t, row_max, row_sum, means,
            k_rows, v_rows, k_ts, v_ts, mask_part, mask_ts, dropout, first_row, queries, keys,
            scale, TANGENTS, BOOLEAN, False, DIM, DIM_PAD, DV, DV_PAD, ROWS, COLS, False, PRECISION,
        )  # fmt: skip
    # Not pipelined: behind another pipelined loop ptxas would serialize wgmma (C7515).
    for first in tl.range(whole, stop, COLS, num_stages=1):
        acc, acc_t, row_max, row_sum, means = _accumulate(
            first, q_tile, q_ts, acc, acc_t, row_max, row_sum, means,
            k_rows, v_rows, k_ts, v_ts, mask_part, mask_ts, dropout, first_row, queries, keys,
            scale, TANGENTS, BOOLEAN, CAUSAL, DIM, DIM_PAD, DV, DV_PAD, ROWS, COLS, True, PRECISION,
        )  # fmt: skip

    total = row_sum
    if mask is not None:  # a fully masked row is 0
        total = tl.where(row_sum > 0.0, row_sum, 1.0)
    inverse = 1.0 / total
    if o is not None:
        o_rows = at(o, 0, b, h)
        store_rows(o_rows, first_row, queries, acc * inverse[:, None], ROWS, DV, DV_PAD)
        row_lse = row_max / LOG2_E + tl.log(total)
        if mask is not None:
            row_lse = tl.where(row_sum > 0.0, row_lse, float("inf"))
        lse_base = lse + tl.cast(batch_head, tl.int64) * queries
        tl.store(lse_base + rows, row_lse, mask=rows < queries)
    for r in tl.static_range(TANGENTS):
        o_t_rows = at(o_t, r0 + r, b, h)
        store_rows(o_t_rows, first_row, queries, acc_t[r] * inverse[:, None], ROWS, DV, DV_PAD)
        if mu is not None:
            mu_base = mu + ((r0 + r) * batch * heads + batch_head) * queries
            tl.store(mu_base + rows, means[r], mask=rows < queries)


def attention_jvp(
    call: Call,
    query_t: Tensor | None = None,
    key_t: Tensor | None = None,
    value_t: Tensor | None = None,
    mask_t: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the fused forward pass.

    Args:
        call: the primal operands and options.
        query_t: (R, B, H, N, D), R tangents of ``query``, or None for zero.
        key_t: (R, B, G, M, D) or None.
        value_t: (R, B, G, M, Dv) or None.
        mask_t: (R, *mask.shape) or None.

    Returns:
        Output (B, H, N, Dv); its tangents (R, B, H, N, Dv), R = 0 without any; the log-sum-exp of
        the scores (B, H, N), and μ (R, B, H, N), both float32; μ has R = 0 if the scores have no
        tangent.
    """

    tangents = (query_t, key_t, value_t, mask_t)
    return run_jvp((*call.operands, *tangents), call.options)


def run_jvp(
    operands: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`attention_jvp` of operands that are checked once for each layout.

    Args:
        operands: query, key, value, mask and seed of a :class:`Call`, and the four tangents.
        options: scale, dropout_p, is_causal and target of a :class:`Call`.

    Returns:
        As :func:`attention_jvp`.

    Raises:
        ValueError: as :class:`Call` and :class:`Tangents`.
    """
    output, output_t, lse, mu = run(_plan, operands, (*options, autotuning()), tuned())
    return output, output_t, lse, mu  # pyright: ignore[reportReturnType] - none is None


def _plan(query, key, value, mask, seed, query_t, key_t, value_t, mask_t, *options):
    *options, _ = options
    call = Call(query, key, value, mask, seed, *options)
    plan = functools.partial(plan_jvp, call, query_t, key_t, value_t, mask_t)
    count = Tangents(call, query_t, key_t, value_t, mask_t).count
    autotune(call, forward_directions(call, count), lambda: run_launches(plan()[1]))
    return plan()


def plan_jvp(
    call: Call,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    mask_t: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs of :func:`attention_jvp`, to be filled by the launches."""
    tangents = Tangents(call, query_t, key_t, value_t, mask_t)
    count = tangents.count
    batch, heads, queries, dim = call.query.shape
    dim_v = call.value.shape[-1]
    output = empty_heads(batch, heads, queries, dim_v, like=call.query)
    output_t = empty_heads(count, batch, heads, queries, dim_v, like=call.query)
    lse = call.query.new_empty(batch, heads, queries, dtype=call.statistics)
    moved = count if tangents.move_scores else 0
    mu = call.query.new_empty(moved, batch, heads, queries, dtype=call.statistics)
    outputs = (output, output_t, lse, mu)
    if output.numel() == 0:
        return outputs, []

    launches = []
    done = 0
    while done < max(count, 1):
        config, group = configure("forward", call, tangents=count - done)
        groups = min((count - done) // group, MAX_GROUPS) if group else 1
        arguments = call.arguments() | tangents.arguments()
        arguments |= {
            "o": operand(output) if done == 0 else None,
            "o_t": operand(output_t) if count else None,
            "lse": lse if done == 0 else None,
            "mu": mu if moved else None,
            "first_tangent": done,
            "TANGENTS": group,
            "NEGATIVE": call.scale < 0,
            "DIM": dim,
            "DIM_PAD": padded_dim(dim),
            "DV": dim_v,
            "DV_PAD": padded_dim(dim_v),
        }
        grid = (triton.cdiv(queries, config.rows) * batch * heads, groups)
        launches.append(Launch(attention_jvp_kernel, grid, arguments, config))
        done += max(group * groups, 1)
    return outputs, launches
