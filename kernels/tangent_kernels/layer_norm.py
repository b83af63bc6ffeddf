"""Layer and RMS normalization with tangents.

With x̂ = (x - m) r, m = mean(x) (0 for RMS), r = 1/√(mean((x - m)²) + ε), K elements in a row:

    y = w∘x̂ + b        y_t = w∘(J x_t) + w_t∘x̂ + b_t        J = r (I - 1 1ᵀ/K - x̂ x̂ᵀ/K)

(without 1 1ᵀ/K for RMS). kernels/README.md derives the adjoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import Launch, device_of
from tangent_kernels._rows import load_row, row_config, row_operand, store_row

PARTS = 512  # most programs that sum the gradients of weight and bias, each over its own rows

Optional = Tensor | None


@triton.jit
def _vector(pointer, cols, width):
    # pointer: (K,)
    return tl.load(pointer + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _project(vector, normal, rstd, inside, width, CENTER: tl.constexpr):
    """J v, where v is 0 outside of the row."""
    if CENTER:
        vector = tl.where(inside, vector - tl.sum(vector, 1)[:, None] / width, 0.0)
    along = tl.sum(normal * vector, 1)[:, None] / width
    return rstd * (vector - normal * along)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x,  # (rows, K) and its row stride; the same for x_t, y and y_t
    weight,  # (K,) or None; the same for bias and their tangents
    bias,
    x_t,  # or None
    weight_t,
    bias_t,
    y,
    y_t,
    mean,  # (rows,) float32, or None for RMS
    rstd,  # (rows,) float32
    rows,
    width,
    eps,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y and y_t of ROWS rows, each operand read once."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = index.to(tl.int64)[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (cols < width)

    value = load_row(x, row, cols, inside)
    if CENTER:
        center = tl.sum(value, 1)[:, None] / width
        tl.store(mean + row, center, mask=row < rows)
        value = tl.where(inside, value - center, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1)[:, None] / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    normal = value * scale

    output = normal
    if weight is not None:
        gain = _vector(weight, tl.arange(0, WIDTH), width)
        output = output * gain
    if bias is not None:
        output += _vector(bias, tl.arange(0, WIDTH), width)
    store_row(y, row, cols, output, inside)

    tangent = tl.zeros_like(normal)
    if x_t is not None:
        direction = load_row(x_t, row, cols, inside)
        tangent = _project(direction, normal, scale, inside, width, CENTER)
        if weight is not None:
            tangent *= gain
    if weight_t is not None:
        tangent += normal * _vector(weight_t, tl.arange(0, WIDTH), width)
    if bias_t is not None:
        tangent += _vector(bias_t, tl.arange(0, WIDTH), width)
    store_row(y_t, row, cols, tangent, inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def layer_norm_backward_kernel(
    x,  # (rows, K) and its row stride; the same for the next five
    x_t,  # or None
    grad,  # G, cotangent of y, or None
    grad_t,  # H, cotangent of y_t
    grad_x,  # or None where not needed; the same for all that follow
    grad_x_t,
    weight,  # (K,)
    weight_t,
    mean,  # (rows,) float32, or None for RMS
    rstd,  # (rows,) float32
    grad_weight,  # (parts, K) float32, sums over each program's rows; the same for the next three
    grad_bias,
    grad_weight_t,
    grad_bias_t,
    rows,
    width,
    tiles,  # of rows, for each program
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of G·y + H·y_t by x, w, b and their tangents."""
    part = tl.program_id(0)
    line = tl.arange(0, WIDTH)
    cols = line[None, :]
    by_weight = tl.zeros((WIDTH,), tl.float32)
    by_bias = tl.zeros((WIDTH,), tl.float32)
    by_weight_t = tl.zeros((WIDTH,), tl.float32)
    by_bias_t = tl.zeros((WIDTH,), tl.float32)

    for tile in range(0, tiles):
        start = (part.to(tl.int64) * tiles + tile) * ROWS
        row = (start + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (cols < width)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        value = load_row(x, row, cols, inside)
        if CENTER:
            center = tl.load(mean + row, mask=row < rows, other=0.0)
            value = tl.where(inside, value - center, 0.0)
        normal = value * scale
        cotangent_t = load_row(grad_t, row, cols, inside)
        into = cotangent_t  # a = w∘H
        if weight is not None:
            into = into * _vector(weight, line, width)
        if grad_x_t is not None or grad_x is not None:
            pulled = _project(into, normal, scale, inside, width, CENTER)  # J a
        if grad_x_t is not None:
            store_row(grad_x_t, row, cols, pulled, inside)
        if grad_bias_t is not None:
            by_bias_t += tl.sum(cotangent_t, 0)
        if grad_weight_t is not None:
            by_weight_t += tl.sum(cotangent_t * normal, 0)

        if x_t is not None and (grad_x is not None or grad_weight is not None):
            direction = load_row(x_t, row, cols, inside)
            pushed = _project(direction, normal, scale, inside, width, CENTER)  # J x_t
        if grad is not None:
            cotangent = load_row(grad, row, cols, inside)
        if grad_bias is not None and grad is not None:
            by_bias += tl.sum(cotangent, 0)
        if grad_weight is not None:
            if grad is not None:
                by_weight += tl.sum(cotangent * normal, 0)
            if x_t is not None:
                by_weight += tl.sum(cotangent_t * pushed, 0)
        if grad_x is not None:
            into_normal = tl.zeros_like(normal)  # w∘G + w_t∘H
            if grad is not None:
                into_normal += cotangent
                if weight is not None:
                    into_normal *= _vector(weight, line, width)
            if weight_t is not None:
                into_normal += cotangent_t * _vector(weight_t, line, width)
            result = _project(into_normal, normal, scale, inside, width, CENTER)
            if x_t is not None:
                per_row = scale / width  # scales rows, not the tile: fewer registers
                alpha = per_row * tl.sum(normal * into, 1)[:, None]
                beta = per_row * tl.sum(normal * direction, 1)[:, None]
                both = per_row * tl.sum(into * pushed, 1)[:, None]
                result -= both * normal + beta * pulled + alpha * pushed
            store_row(grad_x, row, cols, result, inside)

    keep = line < width
    place = part * width + line
    if grad_weight is not None:
        tl.store(grad_weight + place, by_weight, mask=keep)
    if grad_bias is not None:
        tl.store(grad_bias + place, by_bias, mask=keep)
    if grad_weight_t is not None:
        tl.store(grad_weight_t + place, by_weight_t, mask=keep)
    if grad_bias_t is not None:
        tl.store(grad_bias_t + place, by_bias_t, mask=keep)


# --- launches ------------------------------------------------------------------------------


def layer_norm_jvp(
    x: Tensor,
    weight: Optional,
    bias: Optional,
    x_t: Optional,
    weight_t: Optional,
    bias_t: Optional,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Optional, Tensor]:
    """Normalization of x and its tangent; an absent tangent is None.

    Args:
        x: (..., K), K = weight.numel() or, without one, x.shape[-1]; at most MAX_WIDTH.
        weight: K elements, or None for ones.
        bias: K elements, or None for zeros.
        x_t: tangent of ``x``; the same for the next two.
        weight_t: tangent of ``weight``.
        bias_t: tangent of ``bias``.
        eps: added under the root.
        centered: layer normalization; False for RMS.

    Returns:
        y and y_t, each as ``x`` and contiguous; mean (None for RMS) and 1/deviation of each row,
        float32.
    """
    results, launch = plan_jvp(x, weight, bias, x_t, weight_t, bias_t, eps, centered)
    with device_of(x):
        launch.run()
    return results


def plan_jvp(
    x, weight, bias, x_t, weight_t, bias_t, eps, centered
) -> tuple[tuple[Tensor, Tensor, Optional, Tensor], Launch]:
    """Empty results of :func:`layer_norm_jvp` and the launch that fills them."""
    width = x.shape[-1]
    rows = x.numel() // width

    def empty():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def statistic():
        return torch.empty(rows, dtype=torch.float32, device=x.device)

    y, y_t = empty(), empty()
    mean, rstd = statistic() if centered else None, statistic()
    config = row_config(width, 16)
    arguments = {
        "x": row_operand(x, width),
        "weight": weight,
        "bias": bias,
        "x_t": row_operand(x_t, width),
        "weight_t": weight_t,
        "bias_t": bias_t,
        "y": row_operand(y, width),
        "y_t": row_operand(y_t, width),
        "mean": mean,
        "rstd": rstd,
        "rows": rows,
        "width": width,
        "eps": eps,
        "CENTER": centered,
    }
    grid = (triton.cdiv(rows, config.rows),)
    return (y, y_t, mean, rstd), Launch(layer_norm_kernel, grid, arguments, config)


def layer_norm_vjp(
    x: Tensor,
    weight: Optional,
    mean: Optional,
    rstd: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Optional, Optional, Optional]:
    """Gradients of y by x, weight and bias, which are also those of y_t by their tangents.

    Args:
        x: (..., K), the normalized operand.
        weight: K elements, or None.
        mean: as :func:`layer_norm_jvp` returned it, None for RMS.
        rstd: as :func:`layer_norm_jvp` returned it.
        grad: cotangent of y (or y_t), as ``x``.
        needs: which of the three gradients to compute; the others are None.
    """
    primals = (x, weight, mean, rstd)
    found = _backward(primals, (None, None), (None, grad), (False,) * 3, needs)
    return found[3], found[4], found[5]


def layer_norm_second_vjp(
    x: Tensor,
    weight: Optional,
    mean: Optional,
    rstd: Tensor,
    x_t: Optional,
    weight_t: Optional,
    grads: tuple[Optional, Tensor],
    needs: Sequence[bool],
    needs_t: Sequence[bool],
) -> tuple[Optional, ...]:
    """Gradients of G·y + H·y_t by x, weight, bias, and by their tangents.

    Args:
        x: (..., K), the normalized operand.
        weight: K elements, or None.
        mean: as :func:`layer_norm_jvp` returned it, None for RMS.
        rstd: as :func:`layer_norm_jvp` returned it.
        x_t: tangent of ``x``, or None.
        weight_t: tangent of ``weight``, or None.
        grads: G or None, and H.
        needs: which of the gradients by x, weight, bias to compute; the others are None.
        needs_t: the same for their tangents.
    """
    return _backward((x, weight, mean, rstd), (x_t, weight_t), grads, needs, needs_t)


def _backward(primals, tangents, grads, needs, needs_t) -> tuple[Optional, ...]:
    results, launch = plan_backward(primals, tangents, grads, needs, needs_t)
    with device_of(primals[0]):
        launch.run()
    dtype = primals[0].dtype if primals[1] is None else primals[1].dtype
    x, weight, bias, x_t, weight_t, bias_t = results

    def summed(parts):
        return None if parts is None else parts.sum(0).to(dtype)

    return x, summed(weight), summed(bias), x_t, summed(weight_t), summed(bias_t)


def plan_backward(primals, tangents, grads, needs, needs_t) -> tuple[tuple, Launch]:
    """Empty results, with partial sums for weight and bias, and the launch that fills them."""
    x, weight, mean, rstd = primals
    x_t, weight_t = tangents
    grad, grad_t = grads
    width = x.shape[-1]
    rows = x.numel() // width
    second = x_t is not None or weight_t is not None or grad is not None
    config = row_config(width, 8 if second else 16)
    tiles = triton.cdiv(triton.cdiv(rows, config.rows), PARTS)
    parts = triton.cdiv(rows, config.rows * tiles)

    def like_x(need):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None

    def sums(need):
        return torch.empty(parts, width, dtype=torch.float32, device=x.device) if need else None

    primal = like_x(needs[0]), sums(needs[1]), sums(needs[2])
    tangent = like_x(needs_t[0]), sums(needs_t[1]), sums(needs_t[2])
    arguments = {
        "x": row_operand(x, width),
        "x_t": row_operand(x_t, width),
        "grad": row_operand(grad, width),
        "grad_t": row_operand(grad_t, width),
        "grad_x": row_operand(primal[0], width),
        "grad_x_t": row_operand(tangent[0], width),
        "weight": weight,
        "weight_t": weight_t,
        "mean": mean,
        "rstd": rstd,
        "grad_weight": primal[1],
        "grad_bias": primal[2],
        "grad_weight_t": tangent[1],
        "grad_bias_t": tangent[2],
        "rows": rows,
        "width": width,
        "tiles": tiles,
        "CENTER": mean is not None,
    }
    launch = Launch(layer_norm_backward_kernel, (parts,), arguments, config)
    return (*primal, *tangent), launch
