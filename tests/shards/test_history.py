"""Histories: what they say, that no delta depends on them, and that they go with the result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from shard_runs import FAST, bits, create_plan, image_folder, make_plan, run_here, trained

from tangent_ops import fit, load_delta
from tangent_ops.errors import ArgumentError, PlanError
from tangent_ops.shards import ImageData, Plan, ShardRecipe, by_hash, forget, job, results, settle
from tangent_ops.shards.history import history_path, read_history
from tangent_ops.shards.summary import summary_path, write_summary

pytestmark = pytest.mark.usefixtures("in_this_process")

STEPS: dict[str, Any] = {"epochs": 3, "schedule": "constant"}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)


def plan_of(folder: Path, run: str = "run", *, measured: bool = True, **recipe: Any) -> Plan:
    """A plan of two shards, whose validation images have as many classes."""
    if not (folder / "valid").exists():
        image_folder(folder / "valid", each=5, seed=9)
        make_plan(folder, run="unused")
    validation = ImageData(str(folder / "valid")) if measured else None
    assignment = by_hash(ImageData(str(folder / "images")).open().ids, 2)
    recipe = {**FAST, **STEPS, **recipe}
    return create_plan(folder, assignment, run, recipe=ShardRecipe(**recipe), validation=validation)


def right(plan: Plan, tangent: torch.nn.Module) -> float:
    """The share of validation images that a model classifies correctly, one by one."""
    assert plan.validation is not None
    samples = plan.validation.open(plan.anchor_info.input)
    with torch.no_grad():
        found = [int(tangent.eval()(image[None]).argmax()) == target for image, target in samples]
    return sum(found) / len(found)


def read(plan: Plan, shard: str) -> Any:
    found = read_history(plan, plan.job(shard).hash)
    assert found is not None
    return found


def test_a_history_is_that_of_the_fit(tmp_path: Path) -> None:
    """Epoch by epoch, against fits of one, two and three epochs."""
    plan = trained(plan_of(tmp_path))
    found = read(plan, "shard-1")
    assert found.seconds > 0 and found.bound is None
    for epochs in (1, 2, 3):
        tangent = plan.tangent()
        data = job.job_data(plan, plan.job("shard-1"))
        options: dict[str, Any] = {**FAST, **STEPS, "epochs": epochs, "amp": False}
        history = fit(tangent, data, cache=True, progress=False, **options)
        assert found.loss[:epochs] == tuple(history.loss)
        assert found.lr[:epochs] == tuple(history.lr)
        assert found.accuracy[epochs - 1] == right(plan, tangent)
    assert len(set(found.accuracy)) > 1  # or the test says little


@pytest.mark.parametrize("recipe", [{"augment": True}, {}], ids=["augmented", "cached"])
def test_no_delta_depends_on_validation_images(tmp_path: Path, recipe: dict[str, Any]) -> None:
    measured = trained(plan_of(tmp_path, "with", **recipe))
    alone = trained(plan_of(tmp_path, "without", measured=False, **recipe))
    assert len(bits(measured)) == 2 and bits(measured) == bits(alone)
    assert len(read(measured, "shard-0").accuracy) == 3
    assert read(alone, "shard-0").accuracy == ()
    assert read(alone, "shard-0").loss == read(measured, "shard-0").loss


def test_an_exact_shard_has_a_bound_also_after_forget(tmp_path: Path) -> None:
    plan = trained(plan_of(tmp_path, method="exact", l2=0.1, tol=1e-5, epochs=15))
    settle(plan)
    before = history_path(plan, plan.job("shard-0").hash)
    for _ in range(2):
        found = read(plan, "shard-0")
        tangent = plan.tangent()
        job_now = plan.job("shard-0")
        delta = load_delta(plan.result_path(job_now.hash))
        tangent.load_delta_dict(delta)
        size = sum(float(value.double().square().sum()) for value in delta.values()) ** 0.5
        assert 0 < found.bound <= 1.1e-5 * size
        assert (found.loss, found.accuracy) == ((), (right(plan, tangent),))
        if before.exists():
            forget(plan, sample=job_now.samples[0].id, progress=False)
    assert not before.exists()


def test_images_that_are_gone_keep_no_shard_from_its_end(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "moved")
    told = job.attempt(str(plan.path), "shard-0")
    assert "valid is no folder" in told["unmeasured"] and "error" not in told
    assert (read(plan, "shard-0").accuracy, len(read(plan, "shard-0").loss)) == ((), 3)
    plan = Plan.open(plan.path)
    plan.set_validation(ImageData(str(tmp_path / "moved")))
    reopened = Plan.open(plan.path)
    assert reopened.validation == ImageData(str(tmp_path / "moved"))
    job.attempt(str(plan.path), "shard-1")
    assert len(read(reopened, "shard-1").accuracy) == 3


def test_validation_images_that_do_not_fit(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    images = tmp_path / "images"
    image_folder(tmp_path / "more", classes=5)
    refused(ArgumentError, "class 'class4'", plan.set_validation, ImageData(str(tmp_path / "more")))
    refused(
        ArgumentError, "is a validation image, too", plan.set_validation, ImageData(str(images))
    )
    assert plan.validation == Plan.open(plan.path).validation == ImageData(str(tmp_path / "valid"))
    with pytest.raises(ArgumentError, match="is a validation image, too"):
        create_plan(
            tmp_path, {"a": ImageData(str(images)).open().ids}, "new",
            validation=ImageData(str(images)),
        )  # fmt: skip
    assert not (tmp_path / "new").exists()
    with sqlite3.connect(plan.path / "plan.sqlite") as database:
        database.execute("UPDATE about SET value = '3' WHERE key = 'validation'")
    refused(PlanError, "damaged validation source", Plan.open, plan.path)


def test_a_private_fit_has_none(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")
    private = {"dp_epsilon": 3.0, "dp_delta": 1e-5, "dp_steps": 2, "dp_batch_size": 4.0}
    plan = plan_of(tmp_path, **private)
    told = job.attempt(str(plan.path), "shard-0")
    assert told.keys() == {"seconds"}
    assert plan.shards()[0].done and read_history(plan, plan.job("shard-0").hash) is None


def contents(plan: Plan) -> set[str]:
    """The names of all files among the results."""
    return {path.name for path in plan.results_path.iterdir()}


def test_a_history_goes_with_its_delta(tmp_path: Path) -> None:
    plan = trained(plan_of(tmp_path))
    settle(plan)
    old = history_path(plan, plan.job("shard-0").hash)
    (tmp_path / "link").hardlink_to(old)
    size = old.stat().st_size
    mine = plan.results_path / "notes.json"  # and no file of other names
    mine.write_text("{}")
    forget(plan, sample=plan.job("shard-0").samples[0].id, executor="local", progress=False)
    assert not old.exists()
    assert (tmp_path / "link").read_bytes() == bytes(size)  # it was overwritten
    assert len(read(plan, "shard-0").loss) == 3
    jobs = [plan.job(name).hash[:32] for name in ("shard-0", "shard-1")]
    both = {f"{name}.{end}" for name in jobs for end in ("json", "safetensors")}
    assert contents(plan) == both | {"notes.json"}
    forget(plan, shard="shard-0", progress=False)
    assert contents(plan) == {f"{jobs[1]}.json", f"{jobs[1]}.safetensors", "notes.json"}


def killed(work: Callable[[], object]) -> None:
    """Runs work in a process that has to kill itself."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_between_history_and_delta(tmp_path: Path, monkeypatch) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.setattr(job, "save", kill)
    killed(lambda: job.attempt(str(plan.path), "shard-0"))
    assert contents(plan) == {history_path(plan, plan.job("shard-0").hash).name}
    forget(plan, shard="shard-0", progress=False)
    assert contents(plan) == set()


@pytest.mark.parametrize("last", [".json", ".safetensors"])
def test_killed_after_one_of_them_is_erased(tmp_path: Path, monkeypatch, last: str) -> None:
    plan = trained(plan_of(tmp_path))
    settle(plan)
    write_summary(plan)
    assert "shard-0" in summary_path(plan).read_text()
    staying = {name for name in contents(plan) if name.startswith(plan.job("shard-1").hash[:32])}

    def erase(path: Path, real=results.erase) -> None:
        real(path)
        if path.suffix == last:
            kill()

    monkeypatch.setattr(results, "erase", erase)
    killed(lambda: forget(plan, shard="shard-0", progress=False))
    monkeypatch.undo()
    assert not summary_path(plan).exists()  # it went first
    assert "shard-0" not in [shard.name for shard in plan.shards()]
    settle(plan)  # what the next command does
    assert len(staying) == 2 and contents(plan) == staying


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "damaged, or no history"),
        ("{", "damaged, or no history"),
        ("{}", "of another job"),
        ("[" * 100_000, "damaged, or no history"),
    ],
)
def test_a_damaged_one_is_named(tmp_path: Path, text: str, said: str) -> None:
    plan = plan_of(tmp_path)
    path = history_path(plan, plan.job("shard-0").hash)
    path.write_text(text)
    refused(PlanError, f"{path.name} is .*{said}", read_history, plan, plan.job("shard-0").hash)


@pytest.mark.parametrize("change", [{"loss": ["a"]}, {"lr": 3}, {"more": 1}, {"seconds": 1e999}])
def test_a_value_that_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = trained(plan_of(tmp_path, epochs=1))
    path = history_path(plan, plan.job("shard-0").hash)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(PlanError, "is damaged", read_history, plan, plan.job("shard-0").hash)
