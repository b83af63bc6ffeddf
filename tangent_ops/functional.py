"""Operations on plain and dual tensors, one file each.

An op checks its arguments, chooses a backend and defines the derivative for autograd. It has the
signature of PyTorch's own function, and without a tangent it calls that function. PyTorch's rules
also carry the tangent wherever they have to nest: in compiled code (Inductor fuses there), in what
``make_fx`` and ``torch.func.linearize`` trace, under ``vmap`` and other ``torch.func`` transforms,
and in a ``dual_level()`` whose primals are tracked by reverse mode. In the other cases the op
computes output and tangent together:

- plain ``dual_level()``, primals frozen (a linearized model): by the Triton kernels on CUDA, by
  eager formulas elsewhere. The backward pass is the primal's own, and keeps no tangent.
- a single ``torch.func.jvp``: by the Triton kernels on CUDA, with gradients by primals and
  tangents; elsewhere PyTorch's rules carry the tangent.

``backend`` chooses what computes these cases; it does not change which cases they are. Attention
covers more cases: see :func:`scaled_dot_product_attention`.
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
