"""Differential privacy for tangent models: training, regression, accounting, audits.

The gradient of Δ for one sample is the anchor's vector-Jacobian product with that sample's
cotangent, so one forward and backward pass of the tangent model gives all that clipping needs.
Everything here needs the extra ``privacy``: Opacus, dp-accounting and scipy.
"""

from importlib.util import find_spec

if missing := [n for n in ("opacus", "dp_accounting", "scipy") if find_spec(n) is None]:
    raise ImportError(
        f'tangent_ops.privacy needs {", ".join(missing)}: pip install "tangent-ops[privacy]"'
    )

from typing import TYPE_CHECKING

from tangent_ops.lazy_names import lazy

if TYPE_CHECKING:
    from tangent_ops.privacy.accounting import Phase, epsilon, failure, noise_multiplier_for
    from tangent_ops.privacy.auditing.audit import Audit, audit
    from tangent_ops.privacy.auditing.audit_fit import audit_fit
    from tangent_ops.privacy.auditing.canary import canary_score, make_canary
    from tangent_ops.privacy.convex.bounded import Bounds
    from tangent_ops.privacy.convex.jacobian_norms import jacobian_norms
    from tangent_ops.privacy.convex.last_iterate import LastIterate, fit_last_iterate
    from tangent_ops.privacy.convex.output_perturbation import PerturbedOutput, perturb_output
    from tangent_ops.privacy.fit import PrivateFit, fit_private
    from tangent_ops.privacy.noise import NoiseSource
    from tangent_ops.privacy.options import Privacy
    from tangent_ops.privacy.parallel_composition import LedgerPrivacy, ledger_privacy, parallel
    from tangent_ops.privacy.per_sample.gradients import PerSampleGradients, per_sample_gradients
    from tangent_ops.privacy.regression.coordinates import (
        PublicCoordinates,
        PublicNorms,
        public_coordinates,
    )
    from tangent_ops.privacy.regression.noisy_descent import GroupClips, fit_noisy_descent
    from tangent_ops.privacy.regression.noisy_solution import NoisyStatistics, add_shards
    from tangent_ops.privacy.regression.noisy_statistics import (
        FeatureBounds,
        Shares,
        noisy_statistics,
    )
    from tangent_ops.privacy.statement import PrivacyStatement, attach, make_statement, statement_of
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "accounting": "Phase epsilon failure noise_multiplier_for",
            "auditing.audit": "Audit audit",
            "auditing.audit_fit": "audit_fit",
            "auditing.canary": "canary_score make_canary",
            "convex.bounded": "Bounds",
            "convex.jacobian_norms": "jacobian_norms",
            "convex.last_iterate": "LastIterate fit_last_iterate",
            "convex.output_perturbation": "PerturbedOutput perturb_output",
            "fit": "PrivateFit fit_private",
            "noise": "NoiseSource",
            "options": "Privacy",
            "parallel_composition": "LedgerPrivacy ledger_privacy parallel",
            "per_sample.gradients": "PerSampleGradients per_sample_gradients",
            "regression.coordinates": "PublicCoordinates PublicNorms public_coordinates",
            "regression.noisy_descent": "GroupClips fit_noisy_descent",
            "regression.noisy_solution": "NoisyStatistics add_shards",
            "regression.noisy_statistics": "FeatureBounds Shares noisy_statistics",
            "statement": "PrivacyStatement attach make_statement statement_of",
        },
    )

__all__ = [
    "Audit",
    "Bounds",
    "FeatureBounds",
    "GroupClips",
    "LastIterate",
    "LedgerPrivacy",
    "NoiseSource",
    "NoisyStatistics",
    "PerSampleGradients",
    "PerturbedOutput",
    "Phase",
    "Privacy",
    "PrivacyStatement",
    "PrivateFit",
    "PublicCoordinates",
    "PublicNorms",
    "Shares",
    "add_shards",
    "attach",
    "audit",
    "audit_fit",
    "canary_score",
    "epsilon",
    "failure",
    "fit_last_iterate",
    "fit_noisy_descent",
    "fit_private",
    "jacobian_norms",
    "ledger_privacy",
    "make_canary",
    "make_statement",
    "noise_multiplier_for",
    "noisy_statistics",
    "parallel",
    "per_sample_gradients",
    "perturb_output",
    "public_coordinates",
    "statement_of",
]
