"""Tangent transformers, and fast Jacobian-vector products through attention, for PyTorch."""

from tangent_ops import errors, losses
from tangent_ops.composition.ledger import Ledger, StatisticsLedger
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import load_statistics, save_statistics
from tangent_ops.delta import Delta, DeltaMeta, load_delta, save_delta
from tangent_ops.evaluate import accuracy, predict
from tangent_ops.exact import Influence, compose_lossless, fit_exact, forget_samples
from tangent_ops.exact.collect import statistics
from tangent_ops.exact.compose import compose
from tangent_ops.family import Family
from tangent_ops.functional import scaled_dot_product_attention
from tangent_ops.model.core_basis import core_basis
from tangent_ops.model.features import CachedFeatures, cache_features
from tangent_ops.model.gradient_basis import gradient_basis
from tangent_ops.model.linearize import last_blocks, linearize
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.forward_ad import fused_forward_ad
from tangent_ops.ops.nn import TangentAttention
from tangent_ops.training.fit import fit
from tangent_ops.training.grouped import fit_grouped
from tangent_ops.training.head import fit_head
from tangent_ops.training.loop import History
from tangent_ops.training.options import Recipe

__all__ = [
    "CachedFeatures",
    "Delta",
    "DeltaMeta",
    "Family",
    "History",
    "Influence",
    "Ledger",
    "LinearizedModel",
    "Recipe",
    "StatisticsLedger",
    "TangentAttention",
    "TangentStatistics",
    "accuracy",
    "cache_features",
    "compose",
    "compose_lossless",
    "core_basis",
    "errors",
    "fit",
    "fit_exact",
    "fit_grouped",
    "fit_head",
    "forget_samples",
    "fused_forward_ad",
    "gradient_basis",
    "last_blocks",
    "linearize",
    "load_delta",
    "load_statistics",
    "losses",
    "predict",
    "save_delta",
    "save_statistics",
    "scaled_dot_product_attention",
    "statistics",
]
