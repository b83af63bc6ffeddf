"""Shards that share a process, and a model, get the bits that they get alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from shard_runs import FAST, bits, create_plan, image_folder, make_plan, trained

from tangent_ops.model.features import cache_features
from tangent_ops.shards import ImageData, Plan, ShardRecipe, by_hash, job, validating
from tangent_ops.shards.history import read_history
from tangent_ops.shards.shared_model import SharedModel


@pytest.mark.parametrize(
    "recipe",
    [
        {"epochs": 2, "optimizer": "momentum"},
        {"epochs": 2, "rank": 2, "cache": False, "augment": True},
        {"method": "exact", "l2": 0.1},
        {"method": "statistics", "core": 2},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
def test_the_same_bits_in_any_order(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard first, with one model for all; the reference makes one for each shard."""
    alone = make_plan_of(tmp_path, "alone", recipe)
    together = make_plan_of(tmp_path, "together", recipe)
    image_folder(tmp_path / "valid", each=3, seed=2)
    for plan in (alone, together):
        plan.set_validation(ImageData(str(tmp_path / "valid")))
    trained(alone)
    read = []

    def cached(*given: Any, **options: Any) -> Any:
        read.append(given)
        return cache_features(*given, **options)

    monkeypatch.setattr(validating, "cache_features", cached)
    shared = SharedModel()
    for shard in reversed(together.shards()):
        assert "error" not in job.attempt(str(together.path), shard.name, shared=shared)
    assert shared.made
    assert len(bits(alone)) >= 3
    assert bits(together) == bits(alone)
    assert len(read) == (recipe.get("method") != "statistics")  # for three shards
    assert accuracies(together) == accuracies(alone)


def accuracies(plan: Plan) -> list[tuple[float, ...]]:
    histories = [read_history(plan, plan.job(shard.name).hash) for shard in plan.shards()]
    return [() if history is None else history.accuracy for history in histories]


def make_plan_of(folder: Path, run: str, recipe: dict[str, Any]) -> Plan:
    if recipe.get("method") != "statistics":
        return make_plan(folder, run=run, **recipe)
    if not (folder / "public").exists():
        make_plan(folder, run="first")
        image_folder(folder / "public", each=3, seed=1)
    ids = by_hash(ImageData(str(folder / "images")).open().ids, 3)
    public = ImageData(str(folder / "public"))
    return create_plan(folder, ids, run, recipe=ShardRecipe(**{**FAST, **recipe}), public=public)


class Asked:
    """A worker that is asked by hand."""

    def __init__(self, plan: Plan, server: subprocess.Popen[bytes]) -> None:
        self.plan, self.server = plan, server

    def train(self, shard: str) -> dict[str, Any]:
        self.send(shard)
        return self.answer()

    def send(self, shard: str) -> None:
        request = {"run": str(self.plan.path), "shard": shard, "progress": False}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.server.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    def forks(self) -> list[int]:
        pid = self.server.pid
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def worker(plan: Plan) -> Iterator[Asked]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tangent_ops.shards.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as server:
        asked = Asked(plan, server)
        try:
            assert asked.answer() == {"ready": True}
            yield asked
        finally:
            server.kill()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within 20 s")


def running(pid: int) -> bool:
    try:
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        return threads > 1 or " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_small_shards_share_a_process(tmp_path: Path) -> None:
    """A kill loses the unfinished shard only, and none if the process waits; an error ends it."""
    recipe = {"epochs": 1}
    plan = make_plan(tmp_path, shards=5, **recipe)
    reference = trained(make_plan(tmp_path, shards=5, run="reference", **recipe))
    names = [shard.name for shard in plan.shards()]
    with worker(plan) as asked:
        assert "loss" in asked.train(names[0])
        (first,) = asked.forks()
        assert "loss" in asked.train(names[1])
        assert asked.forks() == [first]

        os.kill(first, signal.SIGKILL)  # it waits
        until(lambda: not running(first))
        assert "loss" in asked.train(names[2])
        (second,) = asked.forks()
        assert second != first

        os.kill(second, signal.SIGSTOP)
        asked.send(names[3])
        os.kill(second, signal.SIGKILL)  # it was asked
        assert asked.answer() == {"died": "signal 9"}
        assert asked.forks() == []
        assert sum(shard.done for shard in plan.shards()) == 3

        assert "no shard 'nobody'" in asked.train("nobody")["error"]
        assert asked.forks() == []
        assert "loss" in asked.train(names[3])
        assert "loss" in asked.train(names[4])
        (third,) = asked.forks()
    until(lambda: not running(third))  # the end of its input ends it
    assert bits(plan) == bits(reference)


def test_a_private_fit_shares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the model, nor so the process: the fork ends where no model is shared."""
    pytest.importorskip("opacus", reason="the extra privacy is not installed")
    private = {"dp_epsilon": 5.0, "dp_delta": 1e-3, "dp_steps": 1, "dp_batch_size": 4}
    plan = make_plan(tmp_path, shards=2, l2=0.1, **private)
    shared = SharedModel()
    for shard in plan.shards():
        assert "error" not in job.attempt(str(plan.path), shard.name, shared=shared)
        assert not shared.made
