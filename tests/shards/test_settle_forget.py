"""`settle` brings a ledger in line with its plan; `forget` equals training without the data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from shard_runs import anchor_file, bits, create_plan, image_folder, make_plan, run_here, trained

from tangent_ops import Ledger, compose, fit_exact, load_delta
from tangent_ops.errors import ArgumentError, LedgerError, PlanError, SampleError, UnsupportedError
from tangent_ops.exact import Certificate, Problem
from tangent_ops.shards import (
    ImageData,
    Plan,
    Settled,
    by_column,
    by_hash,
    check_settled,
    forget,
    job,
    settle,
)


def settled(folder: Path, shards: int, weights: str | None = None, **recipe: Any) -> Plan:
    """A trained and composed run."""
    plan = trained(make_plan(folder, shards=shards, **recipe))
    settle(plan, weights=weights)
    return plan


def files(plan: Plan) -> list[Path]:
    return [plan.result_path(shard.job or "") for shard in plan.shards()]


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_settle_adds_what_is_trained(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, shards=3)
    refused(LedgerError, "not composed yet", check_settled, plan)
    assert "error" not in job.attempt(str(plan.path), "shard-1")
    assert settle(plan) == Settled(("shard-1",), (), ("shard-0", "shard-2"))
    assert settle(plan) == Settled((), (), ("shard-0", "shard-2"))
    trained(plan)
    refused(LedgerError, "not in line", check_settled, plan)
    found = settle(plan)
    assert (found.added, found.missing) == (("shard-0", "shard-2"), ())
    mean = compose(files(plan))
    composed = check_settled(plan).composed()
    for name, value in mean.items():  # the ledger's is fixed point: 2^-40
        torch.testing.assert_close(composed[name], value, rtol=1e-6, atol=1e-9)


def test_settle_by_samples(tmp_path: Path) -> None:
    plan = settled(tmp_path, shards=3)
    found = settle(plan, weights="samples")
    assert set(found.forgotten) == set(found.added) == {"shard-0", "shard-1", "shard-2"}
    counts = [shard.samples for shard in plan.shards()]
    assert len(set(counts)) > 1
    expected = compose(files(plan), [count / sum(counts) for count in counts])
    for name, value in check_settled(plan).composed().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)
    refused(ArgumentError, "weights", settle, plan, weights="best")


def test_interrupted_the_weights_are_those_that_were_asked_for(tmp_path: Path, monkeypatch) -> None:
    plan = settled(tmp_path, shards=3)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            settle(plan, weights="samples")
    refused(LedgerError, "3 of them out of date", check_settled, plan)
    settle(plan)
    by_samples = {entry.shard: entry.weight for entry in check_settled(plan).list()}
    assert by_samples == {shard.name: float(shard.samples) for shard in plan.shards()}

    alone = settled(tmp_path, shards=1, weights="samples", run="alone")
    with monkeypatch.context() as patch:
        patch.setattr("tangent_ops.shards.run.run_local", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forget(alone, sample=alone.job("shard-0").samples[0].id, progress=False)
    assert len(Ledger(alone.ledger_path, create=False)) == 0
    settle(trained(alone))
    assert [entry.weight for entry in check_settled(alone).list()] == [23.0]


def test_a_delta_of_another_shard_is_refused(tmp_path: Path) -> None:
    plan = trained(make_plan(tmp_path, shards=2))
    first, second = files(plan)
    first.write_bytes(second.read_bytes())
    refused(PlanError, "is not the delta of shard 'shard-0'", settle, plan)
    first.write_bytes(second.read_bytes()[:-1])
    refused(PlanError, "truncated", settle, plan)


def test_a_forgotten_sample_was_never_there(tmp_path: Path) -> None:
    """Equals a run that is planned, trained and composed without the sample."""
    plan = settled(tmp_path, shards=3, weights="samples")
    target = plan.job("shard-1").samples[0].id
    old = plan.result_path(plan.job("shard-1").hash)
    others = {name: h for name, h in bits(plan).items() if name != old.name}

    found = forget(plan, sample=target, workers=1, progress=False)
    assert (found.shards, found.samples, found.dropped) == (("shard-1",), 1, ())
    assert found.report.trained == ("shard-1",)
    assert not old.exists()
    assert others.items() <= bits(plan).items()
    refused(ArgumentError, "no sample", forget, plan, sample=target, progress=False)
    assert target.encode() not in (plan.path / "plan.sqlite").read_bytes()

    ids = plan.data.open().ids
    without = {k: [i for i in v if i != target] for k, v in by_hash(ids, 3).items()}
    never = create_plan(tmp_path, without, "never")
    settle(trained(never), weights="samples")
    assert bits(plan) == bits(never)
    assert_same(check_settled(plan).composed(), check_settled(never).composed())


def test_customers(tmp_path: Path) -> None:
    """A customer in one shard, a customer in two, and a whole shard."""
    image_folder(tmp_path / "images", each=4)
    anchor_file(tmp_path / "anchor.safetensors")
    ids = ImageData(str(tmp_path / "images")).open().ids
    customers = {id: f"customer-{index % 5}" for index, id in enumerate(ids)}
    by_customer = create_plan(tmp_path, by_column(ids, customers), labels=customers)
    settle(trained(by_customer))
    found = forget(by_customer, label="customer-3", progress=False)
    assert found.dropped == found.shards == ("customer-3",)
    assert found.samples == list(customers.values()).count("customer-3")
    assert found.report.trained == ()
    assert "customer-3" not in check_settled(by_customer)
    assert len(bits(by_customer)) == 4
    assert_same(check_settled(by_customer).composed(), composed_anew(by_customer, tmp_path))
    found = forget(by_customer, shard="customer-0", progress=False)
    assert found.dropped == ("customer-0",)
    for wrong in ({}, {"shard": "customer-1", "label": "customer-1"}, {"label": "customer-3"}):
        with pytest.raises(ArgumentError):
            forget(by_customer, progress=False, **wrong)
    assert len(check_settled(by_customer)) == 3


def composed_anew(plan: Plan, folder: Path):
    ledger = Ledger(folder / "anew")
    for shard in plan.shards():
        ledger.add(shard.name, plan.result_path(shard.job or ""))
    return ledger.composed()


def test_interrupted_after_its_first_step(tmp_path: Path) -> None:
    """The sample is out of the plan; its delta is still there."""
    plan = settled(tmp_path, shards=2)
    target = plan.job("shard-0").samples[0].id
    stale = plan.result_path(plan.job("shard-0").hash)
    plan.manifest.remove(plan.find(sample=target))
    refused(LedgerError, "not in line", check_settled, plan)
    found = settle(plan)
    assert (found.forgotten, found.missing) == (("shard-0",), ("shard-0",))
    assert not stale.exists()
    assert list(check_settled(plan).origins()) == ["shard-1"]
    trained(plan)
    assert settle(plan).added == ("shard-0",)


def test_the_same_command_does_not_bring_it_back(tmp_path: Path) -> None:
    plan = settled(tmp_path, shards=2)
    target = plan.job("shard-0").samples[0].id
    plan.manifest.remove(plan.find(sample=target))
    again = make_plan(tmp_path, shards=2)  # all samples are in the folder still
    assert target not in [sample.id for sample in again.job("shard-0").samples]
    (tmp_path / "images" / target).unlink()
    again = make_plan(tmp_path, shards=2)  # and now that it is gone there, too
    assert target not in [sample.id for sample in again.job("shard-0").samples]
    refused(PlanError, "another recipe", make_plan, tmp_path, shards=2, seed=1)
    refused(PlanError, "other samples", make_plan, tmp_path, shards=3)


def moved(plan: Plan, name: str = "elsewhere") -> ImageData:
    """Moves the images to another folder."""
    old = Path(plan.data.root)
    return ImageData(str(old.rename(old.with_name(name))))


def everything(plan: Plan) -> dict[str, bytes]:
    """The content of every file of a run."""
    return {str(p): p.read_bytes() for p in sorted(plan.path.rglob("*")) if p.is_file()}


def test_nothing_is_forgotten_where_training_again_would_fail(tmp_path: Path) -> None:
    plan = settled(tmp_path, shards=2)
    first, second, *_ = [sample.id for sample in plan.job("shard-0").samples]
    with plan.locked():
        pass  # which leaves a file
    before, images = everything(plan), Path(plan.data.root)

    def unchanged(said: str, **which) -> None:
        with pytest.raises((SampleError, PlanError), match=said):
            forget(plan, **which, progress=False)
        assert everything(plan) == before

    content = (images / second).read_bytes()
    (images / second).write_bytes(content + b"\0")
    said = f"1 of .* are not what they were, '{second}' first.*Nothing was forgotten"
    unchanged(said, sample=first)
    (images / second).unlink()
    unchanged(f"1 of .* cannot be read, '{second}' first.*--data FOLDER", sample=first)
    (images / second).write_bytes(content)
    anchor = plan.anchor_path.read_bytes()
    plan.anchor_path.write_bytes(anchor[:-1] + bytes([anchor[-1] ^ 1]))
    refused(PlanError, "changed after it was written", forget, plan, sample=first, progress=False)
    plan.anchor_path.write_bytes(anchor)
    assert everything(plan) == before
    elsewhere = moved(plan)
    unchanged("images is no folder.*--data FOLDER", sample=first)
    (tmp_path / "elsewhere" / second).unlink()
    said = f"elsewhere: 1 of 23 images cannot be read, '{second}' first"
    unchanged(said, sample=first, data=elsewhere)


def test_what_is_needed_for_privacy_is_looked_at_first(tmp_path: Path, monkeypatch) -> None:
    plan = make_plan(tmp_path, shards=1, dp_epsilon=3.0, dp_delta=1e-5)
    job_of = plan.job("shard-0")
    job.save(plan, job_of, plan.tangent().delta_dict())
    monkeypatch.setitem(sys.modules, "tangent_ops.privacy", None)
    with pytest.raises(UnsupportedError, match="Nothing was forgotten"):
        forget(plan, sample=job_of.samples[0].id, progress=False)
    assert plan.job("shard-0") == job_of


def test_images_that_have_moved(tmp_path: Path, monkeypatch) -> None:
    """Equals a run that was made in the new folder; forgotten images may be missing there."""
    plan = settled(tmp_path, shards=3)
    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    a, b = (plan.job(f"shard-{k}").samples[0].id for k in (0, 1))
    elsewhere = moved(plan)
    for id in (a, b):
        (tmp_path / "elsewhere" / id).unlink()
    found = forget(plan, sample=[a, b], data=elsewhere, progress=False)
    assert (found.shards, found.samples) == (("shard-0", "shard-1"), 2)
    assert set(found.report.trained) == {"shard-0", "shard-1"}
    assert plan.data == Plan.open(plan.path).data == elsewhere

    never = create_plan(tmp_path, by_hash(elsewhere.open().ids, 3), "never", data=elsewhere)
    settle(trained(never))
    assert bits(plan) == bits(never)
    with pytest.raises(ArgumentError, match=f"no sample '{a}'"):
        forget(plan, sample=[never.job("shard-0").samples[0].id, a], progress=False)


def test_a_whole_shard_is_forgotten_without_its_images(tmp_path: Path) -> None:
    plan = settled(tmp_path, shards=2)
    moved(plan)
    assert forget(plan, shard="shard-0", progress=False).dropped == ("shard-0",)
    assert list(check_settled(plan).origins()) == ["shard-1"]


def test_a_plan_goes_on_with_images_that_have_moved(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, shards=2)
    images, other = tmp_path / "images", image_folder(tmp_path / "other", seed=5)
    assignment = by_hash(plan.data.open().ids, 2)
    before = everything(plan)
    with pytest.raises(PlanError, match="24 of 24 images are not what they were"):
        create_plan(tmp_path, assignment, data=ImageData(str(other)))
    with pytest.raises(PlanError, match="24 of 24 images are not what they were"):
        plan.relocate(ImageData(str(other)))
    refused(PlanError, "nowhere is no folder", plan.relocate, ImageData(str(tmp_path / "nowhere")))
    shutil.copytree(images, tmp_path / "copy")
    plan.relocate(ImageData(str(tmp_path / "copy")), dry_run=True, progress=False)
    assert everything(plan) == before
    assert plan.data == ImageData(str(images))
    found = create_plan(tmp_path, assignment, data=ImageData(str(tmp_path / "copy")))
    shutil.rmtree(images)
    trained(found)
    assert [shard.done for shard in plan.shards()] == [True, True]


def test_a_quadratic_shard_is_solved_from_where_it_was(tmp_path: Path) -> None:
    plan = settled(tmp_path, shards=2, method="exact", l2=1.0, tol=1e-4)
    target = plan.job("shard-0").samples[0].id
    before = load_delta(files(plan)[0])
    found = forget(plan, sample=target, progress=False)
    assert found.resolved.keys() == {"shard-0"}
    assert found.report.trained == ()
    delta = load_delta(files(plan)[0])
    assert delta.meta is not None
    certificate = Certificate.from_json(delta.meta.extra["certificate"])
    assert certificate.distance_bound == found.resolved["shard-0"]
    assert certificate.samples == len(plan.job("shard-0").samples)
    assert json.loads(certificate.to_json())["l2"] == 1.0

    tangent = plan.tangent()
    data = job.job_data(plan, plan.job("shard-0"))
    fit_exact(Problem(tangent, data, 1.0, progress=False), 1e-5)
    optimum = tangent.deltas()
    gap = sum(((delta[n] - optimum[n]).double() ** 2).sum().item() for n in delta) ** 0.5
    moved = sum(((delta[n] - before[n]).double() ** 2).sum().item() for n in delta) ** 0.5
    size = sum((optimum[n].double() ** 2).sum().item() for n in delta) ** 0.5
    assert gap <= found.resolved["shard-0"] + 1e-5 * size
    assert found.resolved["shard-0"] <= 1.1e-4 * size
    assert moved > 10 * found.resolved["shard-0"]
    check_settled(plan)
