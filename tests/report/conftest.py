"""Runs of each method that the tests read, and none changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_runs import FAST, anchor_file, create_plan, image_folder, trained

from tangent_ops.shards import ImageData, Plan, ShardRecipe, by_hash, settle
from tangent_ops.shards.composing import compose_run

RECIPES: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact", "l2": 0.5},
    "statistics": {"method": "statistics", "core": 2},
    "gradient": {**FAST, "epochs": 2},
}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_run(folder: Path, method: str, run: str = "", **options: Any) -> Plan:
    """A trained and composed run of three shards, with validation images."""
    if not (folder / "images").exists():
        image_folder(folder / "images")
        image_folder(folder / "public", each=3, seed=7)
        image_folder(folder / "test", each=5, seed=8)
        anchor_file(folder / "anchor.safetensors")
    given = {
        "recipe": ShardRecipe(**RECIPES[method]),
        "public": ImageData(str(folder / "public")),
        "validation": ImageData(str(folder / "test")),
        **options,
    }
    assignment = by_hash(ImageData(str(folder / "images")).open().ids, 3)
    plan = trained(create_plan(folder, assignment, run or method, **given))
    settle(plan)
    if method == "statistics":
        compose_run(plan, "statistics", progress=False)
    return plan


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
