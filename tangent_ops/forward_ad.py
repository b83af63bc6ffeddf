"""Routes the heavy operations of any model to their fused forward-mode versions."""

from __future__ import annotations

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tangent_ops.functional import scaled_dot_product_attention
from tangent_ops.functional._backend import Backend, may_be_dual


class fused_forward_ad(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context in which dual calls of ``F.scaled_dot_product_attention`` run fused.

    PyTorch's fast attention has no forward-mode derivative and raises on dual tensors. Within
    this context such calls go to :func:`tangent_ops.scaled_dot_product_attention`, whatever model
    makes them; calls without a tangent stay PyTorch's.

    Example:
        >>> with fused_forward_ad():
        ...     y, y_t = torch.func.jvp(model, (x,), (v,))

    Args:
        backend: None chooses by device; "triton" or "reference" insists.
    """

    def __init__(self, backend: Backend | None = None):
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and any(
            may_be_dual(operand) for operand in (*args, *kwargs.values())
        ):
            return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
        return func(*args, **kwargs)
