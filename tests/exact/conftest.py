"""The small dense problem, made once per session, with J by passes and as factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import Dense, make


@pytest.fixture(scope="session")
def made() -> Dense:
    return make()


@pytest.fixture(scope="module", params=["passes", "factors"])
def shared(made: Dense, request: pytest.FixtureRequest) -> Dense:
    return replace(made, representation=request.param)


@pytest.fixture
def dense(shared: Dense) -> Dense:
    """The problem with deltas of zero."""
    shared.set(torch.zeros_like(shared.delta))
    return shared
