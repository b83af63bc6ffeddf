"""GELU for plain and dual tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.activation_maps import activation_maps
from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.reference.gelu import gelu_jvp, gelu_vjp

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_NAMES = {approximate: name for name, approximate in APPROXIMATE.items()}


def gelu(input: Tensor, approximate: str = "none", *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.gelu`` with its tangent in the same pass.

        y = x Φ(x)        y_t = (Φ(x) + x φ(x)) x_t

    Where x is frozen no tangent is kept for the backward pass: PyTorch's own rule keeps x_t beside
    x, for derivatives by x that a frozen x does not have. What is computed here and what is left
    to PyTorch's own function is in :mod:`tangent_ops.functional`.

    Args:
        input: any shape, plain or dual.
        approximate: "none" or "tanh".
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if that is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    name = _NAMES.get(approximate)
    found = name and dual_outputs(_OP, (input,), (name,), backend, why_not_in_float(input))
    return found[0] if found else F.gelu(input, approximate=approximate)


def _jvp(primals, tangents, options):
    output, output_t = gelu_jvp(primals[0], tangents[0], APPROXIMATE[options[0]])
    return (output,), (output_t,), ()


_OP = DualOp(
    function=lambda primals, options: (F.gelu(primals[0], approximate=APPROXIMATE[options[0]]),),
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, outputs, statistics: primals,
        vjp=lambda saved, grads, needs, options: (
            gelu_vjp(saved[0], grads[0], APPROXIMATE[options[0]]),
        ),
    ),
    triton=activation_maps(gated=False),
)
