"""One file per op: check the arguments, choose a backend, and tell autograd the derivative."""

from tangent_ops.functional.attention import scaled_dot_product_attention
from tangent_ops.functional.convolution import convolution
from tangent_ops.functional.gelu import gelu
from tangent_ops.functional.layer_norm import layer_norm
from tangent_ops.functional.linear import linear

__all__ = ["convolution", "gelu", "layer_norm", "linear", "scaled_dot_product_attention"]
