"""Shared by the tests of commands on runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shards are trained in this process."""
    from shard_runs import run_here

    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` and ``run``, of three shards fitted exactly and composed."""
    from shard_runs import make_plan, trained

    from tangent_ops.shards import compose_run, settle

    folder = tmp_path_factory.mktemp("exact")
    plan = trained(make_plan(folder, method="exact", l2=0.1))
    settle(plan)
    compose_run(plan, "lossless", progress=False)
    return folder


@pytest.fixture(scope="session")
def statistics_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` and ``run``, of three shards' statistics, composed."""
    from shard_runs import anchor_file, create_plan, image_folder, trained

    from tangent_ops.shards import ImageData, ShardRecipe, by_hash, compose_run, settle

    folder = tmp_path_factory.mktemp("statistics")
    images = image_folder(folder / "images")
    anchor_file(folder / "anchor.safetensors")
    public = ImageData(str(image_folder(folder / "public", each=3, seed=9)))
    plan = create_plan(
        folder,
        by_hash(ImageData(str(images)).open().ids, 3),
        recipe=ShardRecipe(method="statistics", core=2),
        public=public,
    )
    settle(trained(plan))
    compose_run(plan, "statistics", l2=0.01, progress=False)
    return folder


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == package else find(name, *rest),
        )

    return hide
