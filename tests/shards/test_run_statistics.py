"""A run of statistics: a shard's job, its sum, its solution, and what `forget` leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from shard_runs import anchor_file, bits, create_plan, image_folder, run_here, trained

from tangent_ops import StatisticsLedger, TangentStatistics, fit_exact, load_delta
from tangent_ops.composition.ridge import SolvedDelta
from tangent_ops.errors import ArgumentError, LedgerError, PlanError
from tangent_ops.exact import Problem
from tangent_ops.shards import (
    ImageData,
    Plan,
    ShardRecipe,
    by_hash,
    forget,
    run_shards,
    settle,
)
from tangent_ops.shards.composing import compose_run, compositions
from tangent_ops.shards.settling import ledger_of

RECIPE: dict[str, Any] = {"method": "statistics", "core": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image_folder(tmp_path / "images")
    image_folder(tmp_path / "public", each=3, seed=7)
    anchor_file(tmp_path / "anchor.safetensors")
    return tmp_path


def make(folder: Path, run: str = "run", without: tuple[str, ...] = (), **options: Any) -> Plan:
    ids = [id for id in ImageData(str(folder / "images")).open().ids if id not in without]
    recipe = ShardRecipe(**{**RECIPE, **options.pop("recipe", {})})
    given = {"public": ImageData(str(folder / "public")), "recipe": recipe, **options}
    return create_plan(folder, by_hash(ids, 2), run, **given)


def composed(plan: Plan, l2: float | None = None) -> dict[str, torch.Tensor]:
    settle(trained(plan))
    return dict(compose_run(plan, "statistics", l2=l2, progress=False))


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_solution_is_the_fit_on_all_shards(folder: Path) -> None:
    """The oracle: `fit_exact` of all images at once, in the same parametrisation."""
    plan = make(folder)
    found = composed(plan, 0.05)
    tangent = plan.tangent().double()
    samples = plan.data.open(plan.anchor_info.input)
    inputs = torch.stack([samples[k][0] for k in range(len(samples))]).double()
    data = torch.utils.data.TensorDataset(inputs, torch.tensor(samples.targets))
    problem = Problem(tangent, data, 0.05, progress=False)
    fit_exact(problem, 1e-9)
    with torch.no_grad():
        expected = tangent(inputs)
        tangent.load_delta_dict({n: v.double() for n, v in found.items()})
        outputs = tangent(inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("which", ["shard", "label"])
def test_what_is_forgotten_was_never_there(folder: Path, monkeypatch, which: str) -> None:
    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    labels = {"class0/0.png": "ada", "class1/2.png": "ada", "class3/5.png": "bob"}
    plan = make(folder, labels=labels)
    composed(plan)
    gone = {
        "label": ("class0/0.png", "class1/2.png"),
        "shard": tuple(sample.id for sample in plan.job("shard-1").samples),
    }[which]
    staying = [id for id in ImageData(str(folder / "images")).open().ids if id not in gone]
    for id in staying:  # images of others are not touched
        (folder / "images" / id).rename(folder / "images" / f"{id}.moved")
    if which == "shard":  # and the shard's own are not needed
        for id in gone:
            (folder / "images" / id).rename(folder / "images" / f"{id}.moved")
    words = {"label": "ada"} if which == "label" else {"shard": "shard-1"}
    done = forget(plan, **words, progress=False)
    assert (done.samples, done.report.trained) == (len(gone), ())
    for path in (folder / "images").rglob("*.moved"):
        path.rename(path.with_suffix(""))
    never = make(folder, "never", without=gone, labels=labels)
    expected = composed(never)
    assert bits(plan) == bits(never)
    assert_same(load_delta(plan.path / "compositions" / "statistics.safetensors"), expected)
    files = [run.path / "compositions" / "statistics.safetensors" for run in (plan, never)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_lost_image_is_forgotten_by_computing_its_shard_again(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    plan = make(folder)
    composed(plan)
    (folder / "images" / "class2" / "3.png").unlink()
    done = forget(plan, sample="class2/3.png", progress=False)
    assert (done.subtracted, len(done.report.trained)) == ((), 1)
    never = make(folder, "never", without=("class2/3.png",))
    composed(never)
    assert bits(plan) == bits(never)


def test_compositions_are_side_by_side(folder: Path) -> None:
    plan = make(folder)
    refused(LedgerError, "not composed yet", compositions, plan)
    composed(plan)
    found = compositions(plan)
    assert list(found) == ["anchor", "head only", "statistics"]
    probe = found["head only"]
    assert probe is not None
    moved = {name for name, value in probe.items() if value.count_nonzero()}
    assert moved == {"head.weight", "head.bias"}
    settle(plan)
    assert list(compositions(plan)) == ["anchor", "head only", "statistics"]  # it is kept


def test_l2_is_recorded(folder: Path) -> None:
    plan = make(folder)
    composed(plan, 0.5)
    assert Plan.open(plan.path).l2 == 0.5
    assert solved(plan).l2 == 0.5
    by_gcv = solved(plan, "auto").l2
    assert by_gcv == plan_statistics(plan).choose().delta.l2
    refused(ArgumentError, "l2", compose_run, plan, "statistics", l2=-1.0)
    refused(ArgumentError, "'auto'", compose_run, plan, "statistics", l2="best")
    refused(ArgumentError, "compose it by 'statistics'", compose_run, plan, "mean")
    refused(ArgumentError, "weights", settle, plan, weights="samples")


def solved(plan: Plan, l2: str | None = None) -> SolvedDelta:
    found = compose_run(plan, "statistics", l2=l2, progress=False)
    assert isinstance(found, SolvedDelta)
    return found


def plan_statistics(plan: Plan) -> TangentStatistics:
    ledger = ledger_of(plan, create=False)
    assert isinstance(ledger, StatisticsLedger)
    return ledger.statistics()


def test_it_needs_public_images(folder: Path) -> None:
    refused(ArgumentError, "a basis remembers its images", make, folder, public=None)
    other = ImageData(str(image_folder(folder / "other", each=3, seed=8)))
    make(folder)
    refused(PlanError, "other public images", make, folder, public=other)
    refused(PlanError, "another recipe", make, folder, recipe={"core": 3})


def test_a_basis_that_was_changed_is_refused(folder: Path) -> None:
    plan = make(folder)
    other = make(folder, "other", recipe={"core": 3})
    (plan.path / "basis.safetensors").write_bytes((other.path / "basis.safetensors").read_bytes())
    refused(PlanError, "is not the basis of the plan", Plan.open(plan.path).tangent)
    (plan.path / "basis.safetensors").write_bytes(b"")
    refused(PlanError, "cannot be read", Plan.open(plan.path).tangent)


def test_statistics_of_another_shard_are_refused(folder: Path) -> None:
    plan = trained(make(folder))
    first, second = (plan.result_path(plan.job(f"shard-{k}").hash) for k in range(2))
    first.write_bytes(second.read_bytes())
    refused(PlanError, "not the statistics of shard 'shard-0'", settle, plan)


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_workers_give_the_same_bits(folder: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="the extra distributed is not installed")
    plan = make(folder)
    assert not run_shards(plan, executor, workers=2, progress=False).failed
    assert bits(plan) == bits(trained(make(folder, "here")))
