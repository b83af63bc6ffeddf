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

from tangent_ops.functional.attention import scaled_dot_product_attention
from tangent_ops.functional.convolution import convolution
from tangent_ops.functional.gelu import gelu
from tangent_ops.functional.layer_norm import layer_norm
from tangent_ops.functional.linear import linear
from tangent_ops.functional.rms_norm import rms_norm
from tangent_ops.functional.silu import silu
from tangent_ops.functional.softmax import softmax

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
