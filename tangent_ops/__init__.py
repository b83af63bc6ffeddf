"""Tangent transformers, and fast Jacobian-vector products through attention, for PyTorch."""

from tangent_ops import errors, losses
from tangent_ops.compose import compose
from tangent_ops.delta import Delta, DeltaMeta, load_delta, save_delta
from tangent_ops.features import CachedFeatures, cache_features
from tangent_ops.forward_ad import fused_forward_ad
from tangent_ops.functional import scaled_dot_product_attention
from tangent_ops.linearize import LinearizedModel, last_blocks, linearize

__all__ = [
    "CachedFeatures",
    "Delta",
    "DeltaMeta",
    "LinearizedModel",
    "cache_features",
    "compose",
    "errors",
    "fused_forward_ad",
    "last_blocks",
    "linearize",
    "load_delta",
    "losses",
    "save_delta",
    "scaled_dot_product_attention",
]
