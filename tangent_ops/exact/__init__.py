"""Exact methods for tangent models: fits with a bound, lossless composition, removal, influence.

All take a `Problem`: a model, data, a loss and a penalty. With a quadratic loss, fine-tuning a
tangent model is ridge regression with the features J(x), so methods that are heuristics for other
models are exact here. A `Problem` keeps J as layer factors where that costs less; otherwise an
iteration is one jvp and one vjp over the data, in O(P) memory.
"""

from typing import TYPE_CHECKING

from tangent_ops.lazy_names import lazy

if TYPE_CHECKING:
    from tangent_ops.exact.certificate import Certificate, certify
    from tangent_ops.exact.collect import feature_rows
    from tangent_ops.exact.curvature import ShardCurvature
    from tangent_ops.exact.fit import ExactFit, fit_exact
    from tangent_ops.exact.head_sums import head_statistics
    from tangent_ops.exact.influence import CrossValidation, Influence
    from tangent_ops.exact.loo import first_order_scores, leave_one_out
    from tangent_ops.exact.lossless import compose_lossless
    from tangent_ops.exact.problem import Problem
    from tangent_ops.exact.removal import (
        Noised,
        add_samples,
        forget_samples,
        forget_without_data,
        noised,
    )
    from tangent_ops.exact.tangent_kernel import TangentKernel
    from tangent_ops.exact.uncertainty import predictive_covariance
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "certificate": "Certificate certify",
            "collect": "feature_rows",
            "curvature": "ShardCurvature",
            "fit": "ExactFit fit_exact",
            "head_sums": "head_statistics",
            "influence": "CrossValidation Influence",
            "loo": "first_order_scores leave_one_out",
            "lossless": "compose_lossless",
            "problem": "Problem",
            "removal": "Noised add_samples forget_samples forget_without_data noised",
            "tangent_kernel": "TangentKernel",
            "uncertainty": "predictive_covariance",
        },
    )

__all__ = [
    "Certificate",
    "CrossValidation",
    "ExactFit",
    "Influence",
    "Noised",
    "Problem",
    "ShardCurvature",
    "TangentKernel",
    "add_samples",
    "certify",
    "compose_lossless",
    "feature_rows",
    "first_order_scores",
    "fit_exact",
    "forget_samples",
    "forget_without_data",
    "head_statistics",
    "leave_one_out",
    "noised",
    "predictive_covariance",
]
