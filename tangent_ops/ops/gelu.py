"""GELU for plain and dual tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.activation_maps import ACTIVATION_MAPS
from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.reference.gelu import gelu_jvp, gelu_vjp

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_NAMES = {approximate: name for name, approximate in APPROXIMATE.items()}


def gelu(input: Tensor, approximate: str = "none", *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.gelu`` with its tangent in the same pass.

        y = x Φ(x)        y_t = (Φ(x) + x φ(x)) x_t

    Where x is frozen no tangent is kept for the backward pass; PyTorch's own rule keeps x_t beside
    x, for derivatives by x. :mod:`tangent_ops.functional` says which calls are computed here and
    which by PyTorch's own function.

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
    found = None
    if name is not None:
        found = dual_output(_OP, (input,), (name,), backend, why_not_in_float(input))
    return F.gelu(input, approximate=approximate) if found is None else found


def _jvp(primals, tangents, options):
    return *gelu_jvp(primals[0], tangents[0], APPROXIMATE[options[0]]), ()


_OP = DualOp(
    function=lambda primals, options: F.gelu(primals[0], approximate=APPROXIMATE[options[0]]),
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, output, statistics: primals,
        vjp=lambda saved, grad, needs, options: (
            gelu_vjp(saved[0], grad, APPROXIMATE[options[0]]),
        ),
    ),
    triton=ACTIVATION_MAPS,
)
