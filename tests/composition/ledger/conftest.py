"""Small ledgers of both kinds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_contents import AnyLedger, add

from tangent_ops import Ledger, StatisticsLedger


@pytest.fixture(autouse=True, scope="session")
def random_sequences_use_the_tests_own_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """In memory where that is possible (tests/conftest.py): they write thousands of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))
        yield


@pytest.fixture(params=[Ledger, StatisticsLedger])
def kind(request: pytest.FixtureRequest) -> type[AnyLedger]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def one_shard(folder: Path, kind: type[AnyLedger]) -> AnyLedger:
    """The shard "a" alone."""
    ledger = kind(folder)
    add(ledger, "a", 1)
    return ledger


@pytest.fixture
def ledger(folder: Path, kind: type[AnyLedger]) -> AnyLedger:
    """The shards "a", of seed 1, with meta, and "b", of seed 2."""
    ledger = kind(folder)
    add(ledger, "a", 1, {"who": "Ada", "n": 3, "x": 0.5, "ok": True, "no": None})
    add(ledger, "b", 2)
    return ledger
