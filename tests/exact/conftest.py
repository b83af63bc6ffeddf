"""The small dense problem, made once per session."""

from __future__ import annotations

import pytest
import torch
from dense import Dense, make


@pytest.fixture(scope="session")
def shared() -> Dense:
    return make()


@pytest.fixture
def dense(shared: Dense) -> Dense:
    """The problem with deltas of zero."""
    shared.set(torch.zeros_like(shared.delta))
    return shared
