"""Activations with tangents: GELU (exact and tanh) and SiLU.

    y = f(x)        y_t = f'(x) x_t

No formula divides by x, so derivatives near x = 0 are as accurate as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangent_kernels._launch import Launch
from tangent_kernels._plan import run
from tangent_kernels._rows import row_operand

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")

Optional = Tensor | None


@dataclass(frozen=True)
class BlockConfig:
    """Block size and launch options of an elementwise kernel."""

    block: int
    num_warps: int

    def keywords(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "num_stages": 1}


CONFIG = BlockConfig(1024, 4)


@triton.jit
def _sigmoid(x):
    # exp of a positive number could overflow.
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
    x,  # (rows, width) and its row stride; the same for the next three
    x_t,
    y,
    y_t,
    size,
    width,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and y_t of BLOCK elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    zeroth, first, _ = _derivatives(_load(x, index, width, inside), NAME)
    _store(y, index, width, zeroth, inside)
    _store(y_t, index, width, first * _load(x_t, index, width, inside), inside)


@triton.jit
def activation_backward_kernel(
    x,  # (rows, width) and its row stride; the same for the next five
    x_t,  # None if grad_x is None
    grad,  # G, cotangent of y, or None
    grad_t,  # H, cotangent of y_t
    grad_x,  # or None
    grad_x_t,  # or None
    size,
    width,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of G·y + H·y_t by x and x_t."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    _, first, second = _derivatives(_load(x, index, width, inside), NAME)
    cotangent_t = _load(grad_t, index, width, inside)
    if grad_x_t is not None:
        _store(grad_x_t, index, width, first * cotangent_t, inside)
    if grad_x is not None:
        by_x = second * _load(x_t, index, width, inside) * cotangent_t
        if grad is not None:
            by_x += first * _load(grad, index, width, inside)
        _store(grad_x, index, width, by_x, inside)


# --- launches ------------------------------------------------------------------------------


def activation_jvp(x: Tensor, x_t: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """f(x) and its tangent.

    Args:
        x: any shape.
        x_t: tangent of ``x``, same shape.
        name: f, one of ACTIVATIONS.
    """
    y, y_t = run(plan_jvp, (x, x_t), (name,))
    return y, y_t  # pyright: ignore[reportReturnType] - neither is None


def plan_jvp(x, x_t, name) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Empty results of :func:`activation_jvp` and the launch that fills them."""
    y, y_t = _empty(x), _empty(x)
    return (y, y_t), _launch(activation_kernel, {"x": x, "x_t": x_t, "y": y, "y_t": y_t}, name)


def activation_vjp(x: Tensor, grad: Tensor, name: str) -> Tensor:
    """Gradient of y by x, which is also the gradient of y_t by x_t.

    Args:
        x: any shape.
        grad: cotangent of y (or y_t), as ``x``.
        name: f, one of ACTIVATIONS.
    """
    found = activation_second_vjp(x, None, (None, grad), (False, True), name)[1]
    assert found is not None
    return found


def activation_second_vjp(
    x: Tensor,
    x_t: Optional,
    grads: tuple[Optional, Tensor],
    needs: Sequence[bool],
    name: str,
) -> tuple[Optional, Optional]:
    """Gradients of G·y + H·y_t by x and x_t.

    Args:
        x: any shape.
        x_t: tangent of ``x``; may be None if the gradient by x is not needed.
        grads: G or None, and H.
        needs: which of the two gradients to compute; the other is None.
        name: f, one of ACTIVATIONS.
    """
    by_x, by_x_t = run(plan_backward, (x, x_t, *grads), (*needs, name))
    return by_x, by_x_t


def plan_backward(
    x, x_t, grad, grad_t, needs_x, needs_x_t, name
) -> tuple[tuple[Optional, Optional], list[Launch]]:
    """Empty gradients and the launch that fills them."""
    grad_x, grad_x_t = (_empty(x) if need else None for need in (needs_x, needs_x_t))
    named = {"x": x, "x_t": x_t, "grad": grad, "grad_t": grad_t}
    named |= {"grad_x": grad_x, "grad_x_t": grad_x_t}
    return (grad_x, grad_x_t), _launch(activation_backward_kernel, named, name)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _launch(kernel, named: dict[str, Optional], name: str) -> list[Launch]:
    x = named["x"]
    assert x is not None
    size = x.numel()
    dense = all(t is None or t.is_contiguous() for t in named.values())
    width = size if dense else x.shape[-1]
    operands = {key: row_operand(tensor, width) for key, tensor in named.items()}
    arguments = operands | {"size": size, "width": width, "NAME": name}
    return [Launch(kernel, (triton.cdiv(size, CONFIG.block),), arguments, CONFIG)]
