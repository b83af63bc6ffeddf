"""Softmax over rows, with its tangent.

y = softmax(x)        y_t = y∘(x_t - μ)        μ = Σ y∘x_t
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import Launch, device_of
from tangent_kernels._rows import load_row, row_config, row_operand, store_row

Optional = Tensor | None


@triton.jit(do_not_specialize=["rows"])
def softmax_kernel(
    x,  # (rows, K), stride; the same for all that follow
    x_t,
    y,
    y_t,
    rows,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y and y_t of ROWS rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (cols < width)
    value = load_row(x, row, cols, inside, -float("inf"))
    # Rows past the end have no maximum: 0 avoids -inf - -inf.
    top = tl.where(row < rows, tl.max(value, 1)[:, None], 0.0)
    weight = tl.exp(value - top)
    total = tl.where(row < rows, tl.sum(weight, 1)[:, None], 1.0)
    output = weight / total
    store_row(y, row, cols, output, inside)
    direction = load_row(x_t, row, cols, inside)
    mean = tl.sum(output * direction, 1)[:, None]
    store_row(y_t, row, cols, output * (direction - mean), inside)


@triton.jit(do_not_specialize=["rows"])
def softmax_backward_kernel(
    y,  # (rows, K), stride; the same for all that follow
    x_t,  # or None
    grad,  # G, cotangent of y, or None
    grad_t,  # H, cotangent of y_t
    grad_x,  # or None where not needed
    grad_x_t,  # or None where not needed
    rows,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of G·y + H·y_t by x and x_t."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (cols < width)
    output = load_row(y, row, cols, inside)
    cotangent_t = load_row(grad_t, row, cols, inside)
    delta = tl.sum(output * cotangent_t, 1)[:, None]
    if grad_x_t is not None:
        store_row(grad_x_t, row, cols, output * (cotangent_t - delta), inside)
    if grad_x is not None:
        # The gradient by y of G·y + H·(y∘(x_t - Σ y∘x_t)), through the softmax.
        direction = load_row(x_t, row, cols, inside)
        mean = tl.sum(output * direction, 1)[:, None]
        by_output = (cotangent_t - delta) * (direction - mean)
        if grad is not None:
            by_output += load_row(grad, row, cols, inside)
        along = tl.sum(output * by_output, 1)[:, None]
        store_row(grad_x, row, cols, output * (by_output - along), inside)


# --- launches ------------------------------------------------------------------------------


def softmax_jvp(x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its tangent.

    Args:
        x: (..., K), K at most MAX_WIDTH.
        x_t: tangent of ``x``.
    """
    results, launch = plan_jvp(x, x_t)
    with device_of(x):
        launch.run()
    return results


def plan_jvp(x, x_t) -> tuple[tuple[Tensor, Tensor], Launch]:
    """Empty results of :func:`softmax_jvp` and the launch that fills them."""
    y, y_t = _empty(x), _empty(x)
    return (y, y_t), _launch(softmax_kernel, {"x": x, "x_t": x_t, "y": y, "y_t": y_t}, 16)


def softmax_vjp(y: Tensor, grad: Tensor) -> Tensor:
    """Gradient of y by x, which is also the gradient of y_t by x_t.

    Args:
        y: (..., K), the softmax.
        grad: cotangent of y (or y_t), as ``y``.
    """
    found = _backward(y, None, (None, grad), (False, True))[1]
    assert found is not None
    return found


def softmax_second_vjp(
    y: Tensor, x_t: Tensor, grads: tuple[Optional, Tensor], needs: Sequence[bool]
) -> tuple[Optional, Optional]:
    """Gradients of G·y + H·y_t by x and x_t.

    Args:
        y: (..., K), the softmax.
        x_t: tangent of x.
        grads: G or None, and H.
        needs: which of the two gradients to compute; the other is None.
    """
    return _backward(y, x_t, grads, needs)


def _backward(y, x_t, grads, needs) -> tuple[Optional, Optional]:
    results, launch = plan_backward(y, x_t, grads, needs)
    with device_of(y):
        launch.run()
    return results


def plan_backward(y, x_t, grads, needs) -> tuple[tuple[Optional, Optional], Launch]:
    """Empty gradients and the launch that fills them."""
    grad, grad_t = grads
    grad_x, grad_x_t = (_empty(y) if need else None for need in needs)
    named = {"y": y, "x_t": x_t, "grad": grad, "grad_t": grad_t}
    named |= {"grad_x": grad_x, "grad_x_t": grad_x_t}
    return (grad_x, grad_x_t), _launch(softmax_backward_kernel, named, 4)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _launch(kernel, named: dict[str, Optional], held: int) -> Launch:
    like = named["x"] if "x" in named else named["y"]
    assert like is not None
    width = like.shape[-1]
    rows = like.numel() // width
    config = row_config(width, held)
    operands = {key: row_operand(tensor, width) for key, tensor in named.items()}
    grid = (triton.cdiv(rows, config.rows),)
    return Launch(kernel, grid, operands | {"rows": rows, "width": width}, config)
