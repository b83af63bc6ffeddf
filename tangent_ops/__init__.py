"""Tangent transformers, and fast Jacobian-vector products through attention, for PyTorch."""

from typing import TYPE_CHECKING

from tangent_ops.lazy_names import lazy

if TYPE_CHECKING:
    from tangent_ops import errors, losses
    from tangent_ops.composition.ledger import Ledger, StatisticsLedger
    from tangent_ops.composition.statistics import TangentStatistics
    from tangent_ops.composition.statistics_file import load_statistics, save_statistics
    from tangent_ops.composition.with_public import with_public
    from tangent_ops.delta import Delta, DeltaMeta, load_delta, save_delta
    from tangent_ops.evaluate import accuracy, predict
    from tangent_ops.exact import Influence, compose_lossless, fit_exact, forget_samples
    from tangent_ops.exact.collect import statistics
    from tangent_ops.exact.compose import compose
    from tangent_ops.family import Family
    from tangent_ops.functional import scaled_dot_product_attention
    from tangent_ops.hub import load_pretrained, pull_from_hub, push_to_hub, save_pretrained
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
    from tangent_ops.training.lr_range import LrRange, find_lr
    from tangent_ops.training.options import Recipe
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "composition.ledger": "Ledger StatisticsLedger",
            "composition.statistics": "TangentStatistics",
            "composition.statistics_file": "load_statistics save_statistics",
            "composition.with_public": "with_public",
            "delta": "Delta DeltaMeta load_delta save_delta",
            "evaluate": "accuracy predict",
            "exact": "Influence compose_lossless fit_exact forget_samples",
            "exact.collect": "statistics",
            "exact.compose": "compose",
            "family": "Family",
            "functional": "scaled_dot_product_attention",
            "hub": "load_pretrained pull_from_hub push_to_hub save_pretrained",
            "model.core_basis": "core_basis",
            "model.features": "CachedFeatures cache_features",
            "model.gradient_basis": "gradient_basis",
            "model.linearize": "last_blocks linearize",
            "model.linearized": "LinearizedModel",
            "ops.forward_ad": "fused_forward_ad",
            "ops.nn": "TangentAttention",
            "training.fit": "fit",
            "training.grouped": "fit_grouped",
            "training.head": "fit_head",
            "training.loop": "History",
            "training.lr_range": "LrRange find_lr",
            "training.options": "Recipe",
        },
    )

__all__ = [
    "CachedFeatures",
    "Delta",
    "DeltaMeta",
    "Family",
    "History",
    "Influence",
    "Ledger",
    "LinearizedModel",
    "LrRange",
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
    "find_lr",
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
    "load_pretrained",
    "load_statistics",
    "losses",
    "predict",
    "pull_from_hub",
    "push_to_hub",
    "save_delta",
    "save_pretrained",
    "save_statistics",
    "scaled_dot_product_attention",
    "statistics",
    "with_public",
]
