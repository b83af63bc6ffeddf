"""What linearity buys, exactly: fits with a bound, lossless composition, removal, influence.

With a quadratic loss, fine-tuning a tangent model is ridge regression with the features J(x): what
is a heuristic elsewhere is a theorem here. Nothing forms J, unless it says so: an iteration is one
jvp and one vjp over the data, in O(P) memory.
"""

from tangent_ops.exact.certificate import Certificate, certify
from tangent_ops.exact.fit import ExactFit, fit_exact
from tangent_ops.exact.influence import CrossValidation, Influence
from tangent_ops.exact.loo import first_order_scores, leave_one_out
from tangent_ops.exact.lossless import ShardCurvature, compose_lossless
from tangent_ops.exact.removal import (
    Noised,
    add_samples,
    forget_samples,
    forget_without_data,
    noised,
)
from tangent_ops.exact.uncertainty import predictive_covariance

__all__ = [
    "Certificate",
    "CrossValidation",
    "ExactFit",
    "Influence",
    "Noised",
    "ShardCurvature",
    "add_samples",
    "certify",
    "compose_lossless",
    "first_order_scores",
    "fit_exact",
    "forget_samples",
    "forget_without_data",
    "leave_one_out",
    "noised",
    "predictive_covariance",
]
