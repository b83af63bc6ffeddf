"""Runs of each method that the tests read, and none changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from report_runs import make_run

from tangent_ops.shards import Plan


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def exact(folder: Path) -> Plan:
    return make_run(folder, "exact")


@pytest.fixture(scope="session")
def summed(folder: Path) -> Plan:
    return make_run(folder, "statistics")


@pytest.fixture(scope="session")
def stepped(folder: Path) -> Plan:
    return make_run(folder, "gradient")
