"""Plans and runs launches of the backward kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tangent_kernels._launch import (
    Launch,
    empty_heads,
    in_chunks,
    operand,
    padded_dim,
    readable,
)
from tangent_kernels._plan import run, run_launches
from tangent_kernels.attention._call import Call, Tangents, check_rows
from tangent_kernels.attention.backward import grad_query_kernel
from tangent_kernels.attention.configs import (
    apart,
    autotune,
    autotuning,
    backward_direction,
    configure,
    tuned,
)
from tangent_kernels.attention.key_value import grad_key_value_kernel
from tangent_kernels.attention.mask import grad_mask_kernel

Needs = Sequence[bool]  # of query, key, value, mask


class Gradients(NamedTuple):
    """Gradients by query, key, value and mask, or by their tangents; None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None


NONE = Gradients(None, None, None, None)


def attention_vjp(
    call: Call, output: Tensor, lse: Tensor, grad_output: Tensor, needs: Needs
) -> Gradients:
    """First order: gradients of R outputs by the operands, or of R tangents by the tangents.

    Args:
        call: the primal operands and options.
        output: (B, H, N, Dv), of the forward pass.
        lse: (B, H, N) float32, of the forward pass.
        grad_output: (R, B, H, N, Dv), cotangents of the output or of its tangents.
        needs: which gradients to compute.

    Returns:
        Each (R, *shape of the operand), in its dtype.
    """
    return run_vjp((*call.operands, output, lse, grad_output), call.options, needs)


def attention_second_vjp(
    call: Call,
    tangents: Tangents,
    output: Tensor,
    output_t: Tensor,
    lse: Tensor,
    mu: Tensor,
    grad_output: Tensor | None,
    grad_output_t: Tensor,
    needs: Needs,
    needs_t: Needs,
) -> tuple[Gradients, Gradients]:
    """Second order: gradients through the output and its R tangents together.

    Args:
        call: the primal operands and options.
        tangents: of the forward pass.
        output: (B, H, N, Dv), of the forward pass; likewise the next three.
        output_t: (R, B, H, N, Dv).
        lse: (B, H, N) float32.
        mu: (R, B, H, N) float32.
        grad_output: (B, H, N, Dv), cotangent of the output, or None for zero.
        grad_output_t: (R, B, H, N, Dv), cotangents of its tangents.
        needs: which gradients of the primal operands to compute.
        needs_t: the same for the tangents.

    Returns:
        Gradients of the primal operands, each of its operand's shape; and of the tangents,
        (R, *shape).
    """
    operands = (*call.operands, *tangents.operands, output, output_t, lse, mu)
    return run_second_vjp((*operands, grad_output, grad_output_t), call.options, (*needs, *needs_t))


def run_vjp(
    operands: tuple[Tensor | None, ...], options: tuple[Any, ...], needs: Needs
) -> Gradients:
    """:func:`attention_vjp` of operands that are checked once for each layout.

    Args:
        operands: query, key, value, mask and seed of a :class:`Call`; output, lse, grad_output.
        options: scale, dropout_p, is_causal and target of a :class:`Call`.
        needs: which gradients to compute.
    """
    *given, grad_output = operands
    given.append(readable(grad_output))
    found = run(_plan_first, tuple(given), (*options, *needs, autotuning()), tuned())
    return _rounded(operands, found)


def run_second_vjp(
    operands: tuple[Tensor | None, ...], options: tuple[Any, ...], needs: Needs
) -> tuple[Gradients, Gradients]:
    """:func:`attention_second_vjp` of operands that are checked once for each layout.

    Args:
        operands: query, key, value, mask and seed of a :class:`Call`; the four tangents; output,
            output_t, lse, mu, grad_output and grad_output_t.
        options: scale, dropout_p, is_causal and target of a :class:`Call`.
        needs: which gradients to compute: four of the primal operands, four of the tangents.
    """
    *given, grad_output, grad_output_t = operands
    given += [readable(grad_output), readable(grad_output_t)]
    found = run(_plan_second, tuple(given), (*options, *needs, autotuning()), tuned())
    primal, tangent = found[:4], found[4:]
    assert grad_output_t is not None
    if len(grad_output_t) > 1:
        primal = [None if x is None else _summed(x) for x in primal]
    return _rounded(operands, primal), _rounded(operands, tangent)


def _plan_first(query, key, value, mask, seed, output, lse, grad_output, *options):
    *options, needs_q, needs_k, needs_v, needs_mask, _ = options
    call = Call(query, key, value, mask, seed, *options)
    needs = (needs_q, needs_k, needs_v, needs_mask)
    plan = functools.partial(plan_vjp, call, output, lse, grad_output, needs)
    autotune(call, _directions("first", call, needs), lambda: run_launches(plan()[-1]))
    return plan()


def _plan_second(query, key, value, mask, seed, *rest):
    tangents, results, options = rest[:4], rest[4:10], rest[10:14]
    needs, needs_t = rest[14:18], rest[18:22]
    call = Call(query, key, value, mask, seed, *options)
    plan = functools.partial(
        plan_second_vjp, call, Tangents(call, *tangents), *results, needs, needs_t
    )
    directions = _second_directions(call, needs, needs_t)
    autotune(call, directions, lambda: run_launches(plan()[-1]))
    primal, tangent, launches = plan()
    return (*primal, *tangent), launches


def plan_vjp(
    call: Call, output: Tensor, lse: Tensor, grad_output: Tensor, needs: Needs
) -> tuple[Gradients, list[Launch]]:
    """The results of :func:`attention_vjp`, to be filled by the launches."""
    check_rows("grad_output", grad_output, "output", output)
    count = len(grad_output)
    gradients = _empty(call, (count,), needs)
    delta = lse.new_empty(count, *lse.shape)
    return gradients, _first_order(call, output, lse, grad_output, delta, gradients)


def plan_second_vjp(
    call: Call,
    tangents: Tangents,
    output: Tensor,
    output_t: Tensor,
    lse: Tensor,
    mu: Tensor,
    grad_output: Tensor | None,
    grad_output_t: Tensor,
    needs: Needs,
    needs_t: Needs,
) -> tuple[Gradients, Gradients, list[Launch]]:
    """The results of :func:`attention_second_vjp`, the primal ones yet to be summed over R."""
    check_rows("grad_output_t", grad_output_t, "output", output)
    count = len(grad_output_t)
    # Summed over R afterwards, in float32.
    primal = (
        _empty(call, (count,), needs, call.statistics) if count > 1 else _empty(call, (), needs)
    )
    tangent = _empty(call, (count,), needs_t)
    order, by_tangents = "second", tangent
    launches = []
    delta = lse.new_empty(count, *lse.shape)
    if apart(call):
        order, by_tangents = "primal", NONE
        if any(needs_t):
            launches = _first_order(call, output, lse, grad_output_t, delta, tangent)
        if not any(needs):
            return primal, tangent, launches
    rows = {"o": operand(_dense(output)), "o_t": operand(_dense(output_t))}
    common = tangents.arguments() | {
        "lse": lse.contiguous(),
        "mu": mu.contiguous() if tangents.move_scores else None,
        "h": operand(_dense(grad_output_t)),
        "delta": delta,
        "epsilon": lse.new_empty(count, *lse.shape),
        "SECOND": True,
    }
    g = None if grad_output is None else operand(_dense(grad_output))
    alone = count if g is None else 1  # g belongs to the first tangent alone
    first = common | {"g": g, "first_tangent": 0}
    launches += _launches(call, order, alone, rows, first, primal, by_tangents)
    if count > alone:
        rest = common | {"g": None, "first_tangent": alone}
        launches += _launches(call, order, count - alone, rows, rest, primal, by_tangents)
    return primal, tangent, launches


def _first_order(
    call: Call, output: Tensor, lse: Tensor, grad_output: Tensor, delta: Tensor, into: Gradients
) -> list[Launch]:
    """The launches for gradients of R outputs, or of R tangents by the tangents."""
    rows = {"o": operand(_dense(output)), "o_t": None}
    common = Tangents(call, None, None, None, None).arguments() | {
        "lse": lse.contiguous(),
        "mu": None,
        "g": None,
        "h": operand(_dense(grad_output)),
        "delta": delta,
        "epsilon": None,
        "first_tangent": 0,
        "SECOND": False,
    }
    return _launches(call, "first", len(grad_output), rows, common, NONE, into)


def _launches(
    call: Call,
    order: str,
    count: int,
    rows: dict[str, Any],
    common: dict[str, Any],
    primal: Gradients,
    tangent: Gradients,
) -> list[Launch]:
    """The launches for the needed gradients of ``count`` tangents."""
    batch, heads, queries, dim = call.query.shape
    keys, dim_v = call.value.shape[2:]
    if call.query.numel() * count == 0:
        return []
    common = call.arguments() | common
    common |= {"DIM": dim, "DIM_PAD": padded_dim(dim), "DV": dim_v, "DV_PAD": padded_dim(dim_v)}
    config, _ = configure(f"{order} query", call)
    grads = {"grad_q": operand(primal.query), "grad_q_t": operand(tangent.query)}
    grid = (triton.cdiv(queries, config.rows) * batch * heads, count)
    launches = [Launch(grad_query_kernel, grid, common | rows | grads, config)]
    grads = {
        "grad_k": operand(primal.key),
        "grad_k_t": operand(tangent.key),
        "grad_v": operand(primal.value),
        "grad_v_t": operand(tangent.value),
        "GROUPED": heads > call.key.shape[1],
    }
    if any(grads[name] is not None for name in ("grad_k", "grad_k_t", "grad_v", "grad_v_t")):
        config, _ = configure(f"{order} key value", call)
        grid = (triton.cdiv(keys, config.cols) * batch * call.key.shape[1], count)
        launches.append(Launch(grad_key_value_kernel, grid, common | grads, config))
    if primal.mask is not None or tangent.mask is not None:
        assert call.mask is not None
        config, _ = configure(f"{order} mask", call)
        mask_batch, mask_heads, mask_rows, mask_cols = call.mask.shape
        grads = {
            "grad_mask": primal.mask,
            "grad_mask_t": tangent.mask,
            "mask_batch": mask_batch,
            "mask_heads": mask_heads,
            "SUM_ROWS": mask_rows < queries,
            "SUM_COLS": mask_cols < keys,
        }
        tiles = triton.cdiv(mask_rows, config.rows) * triton.cdiv(mask_cols, config.cols)
        grid = (tiles * mask_batch * mask_heads, count)
        launches.append(Launch(grad_mask_kernel, grid, common | grads, config))
    scratch = tuple(x for x in (common["delta"], common["epsilon"]) if x is not None)
    launches = [replace(launch, scratch=scratch) for launch in launches]
    return [chunk for launch in launches for chunk in in_chunks(launch)]


def _summed(grads: Tensor) -> Tensor:
    """Sum over R, in the memory order of one gradient."""
    return torch.sum(grads, 0, out=torch.empty_like(grads[0]))


def _empty(
    call: Call, lead: tuple[int, ...], needs: Needs, dtype: torch.dtype | None = None
) -> Gradients:
    """Uninitialised buffers (*lead, *shape of the operand); float32 for the mask."""
    buffers: list[Tensor | None] = [
        empty_heads(*lead, *x.shape, like=x, dtype=dtype) if need else None
        for x, need in zip((call.query, call.key, call.value), needs, strict=False)
    ]
    mask = None
    if needs[3]:
        assert call.mask is not None
        mask = call.mask.new_empty(*lead, *call.mask.shape, dtype=call.statistics)
    return Gradients(*buffers, mask)


def _rounded(operands: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Gradients:
    """The gradients in their operands' dtype; zeros where there is no query to launch for."""
    rounded = (
        grad
        if grad is None or tensor is None or grad.dtype == tensor.dtype
        else grad.to(tensor.dtype)
        for grad, tensor in zip(gradients, operands, strict=False)
    )
    query = operands[0]
    if query is not None and query.numel() == 0:
        return Gradients(*(None if x is None else x.zero_() for x in rounded))
    return Gradients(*rounded)


def _directions(order: str, call: Call, needs: Needs) -> list[str]:
    """The directions whose tiles :func:`_launches` uses."""
    launched = {"query": True, "key value": needs[1] or needs[2], "mask": needs[3]}
    directions = (f"{order} {kernel}" for kernel, one in launched.items() if one)
    return [backward_direction(direction, call) for direction in directions]


def _second_directions(call: Call, needs: Needs, needs_t: Needs) -> list[str]:
    if not apart(call):
        either = [a or b for a, b in zip(needs, needs_t, strict=True)]
        return _directions("second", call, either)
    first = _directions("first", call, needs_t) if any(needs_t) else []
    return first + (_directions("primal", call, needs) if any(needs) else [])


def _dense(tensor: Tensor) -> Tensor:
    dense = readable(tensor)
    assert dense is not None
    return dense
