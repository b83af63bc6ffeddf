"""The public operations on plain and dual tensors.

An op checks its arguments, chooses a backend and defines the derivative for autograd. It has the
signature of PyTorch's own function, and calls that function if there is no tangent. PyTorch's rules
also carry the tangent where rules have to nest: in compiled code (which Inductor fuses), in traces
of ``make_fx`` and ``torch.func.linearize``, under ``vmap`` and other ``torch.func`` transforms, and
in a ``dual_level()`` whose primals reverse mode tracks. In two cases the op computes output and
tangent together:

- a plain ``dual_level()`` with frozen primals (a linearized model): the Triton kernels on CUDA,
  eager formulas elsewhere. The backward pass is the primal's own, and saves no tangent.
- a single ``torch.func.jvp``: the Triton kernels on CUDA, with gradients by primals and tangents;
  elsewhere PyTorch's rules carry the tangent.

``backend`` chooses the code for these cases; it does not change the cases. Attention covers more
cases: see :func:`scaled_dot_product_attention`.
"""

from tangent_ops.ops.activation import gelu, silu
from tangent_ops.ops.attention.api import scaled_dot_product_attention
from tangent_ops.ops.convolution import convolution
from tangent_ops.ops.linear import linear
from tangent_ops.ops.norm import layer_norm, rms_norm
from tangent_ops.ops.softmax import softmax

__all__ = [
    "convolution",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
]
