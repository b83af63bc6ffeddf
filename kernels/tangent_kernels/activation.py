"""Activations, plain or as the gate of a product, with tangents.

    y = f(x)        y_t = f'(x) x_t
    y = f(x) v      y_t = f'(x) x_t v + f(x) v_t        (GEGLU, SwiGLU: x the gate, v the value)

Never y / x times something: derivatives near x = 0 are as accurate as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import Launch, device_of
from tangent_kernels._rows import row_operand

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")

Optional = Tensor | None


@dataclass(frozen=True)
class BlockConfig:
    """Size and launch options of a kernel that goes element by element."""

    block: int
    num_warps: int

    def keywords(self) -> dict[str, Any]:
        """As the kernel is called with them."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "num_stages": 1}


CONFIG = BlockConfig(1024, 4)


@triton.jit
def _sigmoid(x):
    # The exponential of a positive number could overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _derivatives(x, NAME: tl.constexpr):
    """f, f' and f'' at x."""
    if NAME == "gelu":
        # Φ(x), φ(x): f = xΦ, f' = Φ + xφ, f'' = (2 - x²) φ
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * below, below + x * density, (2.0 - x * x) * density
    elif NAME == "gelu_tanh":
        # (1 + tanh u)/2 = σ(2u), u = √(2/π) (x + a x³): tanh itself would cancel for x < 0
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)  # of 2u
        gate = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        rise = gate * (1.0 - gate)
        bend = 1.5957691216057308 * 0.26829 * x  # of 2u, the second derivative
        first = gate + x * rise * slope
        second = rise * (2.0 * slope + x * (bend + (1.0 - 2.0 * gate) * slope * slope))
        return x * gate, first, second
    else:
        gate = _sigmoid(x)
        rise = gate * (1.0 - gate)
        return x * gate, gate + x * rise, rise * (2.0 + x * (1.0 - 2.0 * gate))


@triton.jit
def _place(operand, index, width):
    # operand: (rows, width) and its row stride
    return operand[0] + index // width * operand[1] + index % width


@triton.jit
def _load(operand, index, width, inside):
    return tl.load(_place(operand, index, width), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(operand, index, width, value, inside):
    pointer = _place(operand, index, width)
    tl.store(pointer, value.to(operand[0].dtype.element_ty), mask=inside)


@triton.jit
def activation_kernel(
    x,  # (rows, width), stride; the same for all that follow
    value,  # v, or None; the same for the next two
    x_t,
    value_t,
    y,
    y_t,  # None without any tangent
    size,
    width,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and y_t of BLOCK elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    zeroth, first, _ = _derivatives(_load(x, index, width, inside), NAME)
    output = zeroth
    if value is not None:
        factor = _load(value, index, width, inside)
        output *= factor
    _store(y, index, width, output, inside)
    if y_t is not None:
        tangent = tl.zeros_like(zeroth)
        if x_t is not None:
            tangent += first * _load(x_t, index, width, inside)
            if value is not None:
                tangent *= factor
        if value_t is not None:
            tangent += zeroth * _load(value_t, index, width, inside)
        _store(y_t, index, width, tangent, inside)


@triton.jit
def activation_backward_kernel(
    x,  # (rows, width), stride; the same for all that follow
    value,  # v, or None; the same for the next three
    x_t,
    value_t,
    grad,  # G, cotangent of y
    grad_t,  # H, cotangent of y_t
    grad_x,  # or None where not needed; the same for all that follow
    grad_value,
    grad_x_t,
    grad_value_t,
    size,
    width,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of G·y + H·y_t by x and v and by their tangents."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    zeroth, first, second = _derivatives(_load(x, index, width, inside), NAME)
    cotangent_t = _load(grad_t, index, width, inside)
    if grad_value_t is not None:
        _store(grad_value_t, index, width, zeroth * cotangent_t, inside)
    scaled = cotangent_t  # v∘H
    if value is not None and (grad_x is not None or grad_x_t is not None):
        factor = _load(value, index, width, inside)
        scaled *= factor
    if grad_x_t is not None:
        _store(grad_x_t, index, width, first * scaled, inside)

    if grad_x is not None or grad_value is not None:
        by_x = tl.zeros_like(zeroth)
        by_value = tl.zeros_like(zeroth)
        if grad is not None:
            cotangent = _load(grad, index, width, inside)
            by_value += zeroth * cotangent
            by_x += first * cotangent
            if value is not None and grad_x is not None:
                by_x *= factor
        if x_t is not None:
            direction = _load(x_t, index, width, inside)
            by_x += second * direction * scaled
            by_value += first * direction * cotangent_t
        if value_t is not None:
            by_x += first * _load(value_t, index, width, inside) * cotangent_t
        if grad_x is not None:
            _store(grad_x, index, width, by_x, inside)
        if grad_value is not None:
            _store(grad_value, index, width, by_value, inside)


# --- launches ------------------------------------------------------------------------------


def activation_jvp(
    x: Tensor, value: Optional, x_t: Optional, value_t: Optional, name: str
) -> tuple[Tensor, Optional]:
    """f(x), or f(x) v, and its tangent (None without any).

    Args:
        x: any shape.
        value: v, as ``x``, or None.
        x_t: tangent of ``x``, or None for zero.
        value_t: tangent of ``value``, or None for zero.
        name: f, one of ACTIVATIONS.
    """
    results, launch = plan_jvp(x, value, x_t, value_t, name)
    with device_of(x):
        launch.run()
    return results


def plan_jvp(x, value, x_t, value_t, name) -> tuple[tuple[Tensor, Optional], Launch]:
    """Empty results of :func:`activation_jvp` and the launch that fills them."""
    dual = x_t is not None or value_t is not None
    y, y_t = _empty(x), _empty(x) if dual else None
    named = {"x": x, "value": value, "x_t": x_t, "value_t": value_t, "y": y, "y_t": y_t}
    return (y, y_t), _launch(activation_kernel, named, name)


def activation_vjp(
    x: Tensor, value: Optional, grad: Tensor, needs: Sequence[bool], name: str
) -> tuple[Optional, Optional]:
    """Gradients of y by x and v; of y_t by their tangents, which are the same map.

    Args:
        x: any shape.
        value: v, as ``x``, or None.
        grad: cotangent of y (or y_t), as ``x``.
        needs: which of the two gradients to compute; the other is None.
        name: f, one of ACTIVATIONS.
    """
    found = _backward((x, value, None, None), (None, grad), (False, False, *needs), name)
    return found[2], found[3]


def activation_second_vjp(
    operands: tuple[Tensor, Optional, Optional, Optional],
    grads: tuple[Optional, Tensor],
    needs: Sequence[bool],
    name: str,
) -> tuple[Optional, ...]:
    """Gradients of G·y + H·y_t by x, v, x_t and v_t.

    Args:
        operands: x, v or None, and their tangents or None.
        grads: G or None, and H.
        needs: which of the four gradients to compute; the others are None.
        name: f, one of ACTIVATIONS.
    """
    return _backward(operands, grads, needs, name)


def _backward(operands, grads, needs, name) -> tuple[Optional, ...]:
    results, launch = plan_backward(operands, grads, needs, name)
    with device_of(operands[0]):
        launch.run()
    return results


def plan_backward(operands, grads, needs, name) -> tuple[tuple[Optional, ...], Launch]:
    """Empty gradients and the launch that fills them."""
    results = tuple(_empty(operands[0]) if need else None for need in needs)
    names = ("x", "value", "x_t", "value_t", "grad", "grad_t")
    named = dict(zip(names, (*operands, *grads), strict=True))
    wanted = ("grad_x", "grad_value", "grad_x_t", "grad_value_t")
    named |= dict(zip(wanted, results, strict=True))
    return results, _launch(activation_backward_kernel, named, name)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _launch(kernel, named: dict[str, Optional], name: str) -> Launch:
    x = named["x"]
    assert x is not None
    size = x.numel()
    dense = all(t is None or t.is_contiguous() for t in named.values())
    width = size if dense else x.shape[-1]
    operands = {key: row_operand(tensor, width) for key, tensor in named.items()}
    arguments = operands | {"size": size, "width": width, "NAME": name}
    return Launch(kernel, (triton.cdiv(size, CONFIG.block),), arguments, CONFIG)
