"""The backends that a test runs on, their devices, and numbers of examples."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tangent_ops.ops.backend import interpreting


def backends(*names: str) -> list[Any]:
    """``names`` for ``pytest.mark.parametrize``; "triton" is marked ``triton``."""
    return [pytest.param(n, marks=pytest.mark.triton) if n == "triton" else n for n in names]


def device_of(backend: str | None) -> str:
    return "cuda" if backend == "triton" and not interpreting() else "cpu"


def examples(count: int) -> settings:
    """Hypothesis' settings for kernels: few examples, not shrunk, since interpreting is slow."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
