"""A value times its activated gate, the tangent and the adjoint of that.

y = f(x) v        y_t = f'(x) x_t v + f(x) v_t
"""

from __future__ import annotations

from torch import Tensor

from tangent_ops.ops.reference.gelu import gelu_jvp
from tangent_ops.ops.reference.silu import silu_jvp


def gated_jvp(
    gate: Tensor, value: Tensor, gate_t: Tensor | None, value_t: Tensor | None, name: str
) -> tuple[Tensor, Tensor]:
    """f(x) v and its tangent.

    Args:
        gate: x, any shape.
        value: v, as ``gate``.
        gate_t: tangent of ``gate``, or None for zero.
        value_t: tangent of ``value``, or None for zero.
        name: f: "gelu", "gelu_tanh" or "silu".
    """
    # The activation's derivative along v is f'(x) v.
    activated, slope = _activation_jvp(gate, value, name)
    output = activated * value
    output_t = None if gate_t is None else slope * gate_t
    if value_t is not None:
        moved = activated * value_t
        output_t = moved if output_t is None else output_t.add_(moved)
    assert output_t is not None
    return output, output_t


def gated_vjp(
    gate: Tensor, value: Tensor, grad: Tensor, needs: tuple[bool, bool], name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of f(x) v by gate and value.

    Args:
        gate: x, any shape.
        value: v, as ``gate``.
        grad: cotangent of the output, as ``gate``.
        needs: which of the two to compute; the other is None.
        name: f: "gelu", "gelu_tanh" or "silu".
    """
    activated, along = _activation_jvp(gate, grad, name)  # f'(x)∘H
    return along * value if needs[0] else None, activated * grad if needs[1] else None


def _activation_jvp(input: Tensor, input_t: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if name == "silu":
        return silu_jvp(input, input_t)
    return gelu_jvp(input, input_t, "tanh" if name == "gelu_tanh" else "none")
