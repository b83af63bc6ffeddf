"""A statement of privacy to start from; needs the extra privacy."""

from __future__ import annotations

from typing import Any

from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.statement import PrivacyStatement, make_statement


def a_statement(*phases: Phase, **changes: Any) -> PrivacyStatement:
    """A statement of one Gaussian mechanism with sigma = 1; ``changes`` replace its arguments."""
    given = {
        "mechanism": "Gaussian",
        "phases": phases or (Phase(1, 1.0, 1),),
        "clip": 1.0,
        "delta": 1e-5,
        "sampling": "all",
        "noise": "dice",
        "assumes": ("the anchor is public",),
    }
    return make_statement(**{**given, **changes})
