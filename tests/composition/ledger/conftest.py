"""Small ledgers."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_helpers import SHARDS, some_delta

from tangent_ops import Ledger


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def one_shard(folder: Path) -> Ledger:
    """The shard "a" alone."""
    ledger = Ledger(folder)
    ledger.add("a", some_delta(1))
    return ledger


@pytest.fixture
def ledger(folder: Path) -> Ledger:
    """The shards "a", with meta, and "b"."""
    ledger = Ledger(folder)
    meta = {"who": "Ada", "n": 3, "x": 0.5, "ok": True, "no": None}
    for (shard, (delta, weight)), about in zip(SHARDS.items(), (meta, None), strict=True):
        ledger.add(shard, delta, weight, about)
    return ledger
