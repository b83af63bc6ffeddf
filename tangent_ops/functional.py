"""One file per op: check the arguments, choose a backend, and tell autograd the derivative.

Each op has the signature of PyTorch's own. Without a tangent it *is* PyTorch's own; it is so too,
tangents being carried by PyTorch's rules, wherever those have to nest: in compiled code (Inductor
fuses there), in what ``make_fx`` and ``torch.func.linearize`` trace, under ``vmap`` and other
``torch.func`` transforms, and in a ``dual_level()`` whose primals are tracked by reverse mode. What
is left is computed here, primal and tangent together:

- plain ``dual_level()``, primals frozen (a linearized model): by the Triton kernels on CUDA, by
  eager formulas elsewhere. The backward pass is the primal's own, and keeps no tangent.
- a single ``torch.func.jvp``: by the Triton kernels on CUDA, with gradients by primals and
  tangents; elsewhere PyTorch's rules carry the tangent.

``backend`` names who computes the calls that are computed here, and does not change which they are.
Attention alone goes further: see :func:`scaled_dot_product_attention`.
"""

from tangent_ops.ops.activation import gelu, silu
from tangent_ops.ops.attention.api import scaled_dot_product_attention
from tangent_ops.ops.convolution import convolution
from tangent_ops.ops.gated import geglu, swiglu
from tangent_ops.ops.layer_norm import add_layer_norm
from tangent_ops.ops.linear import linear
from tangent_ops.ops.norm import layer_norm, rms_norm
from tangent_ops.ops.softmax import softmax

__all__ = [
    "add_layer_norm",
    "convolution",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
]
