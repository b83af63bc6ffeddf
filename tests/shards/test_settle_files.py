"""`settle` erases deltas that the run's workers wrote, and nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_runs import bits, make_plan

from tangent_ops import Ledger, load_delta, save_delta
from tangent_ops.errors import PlanError
from tangent_ops.shards import Plan, job, settle


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan of two shards with deltas of zeros."""
    plan = make_plan(tmp_path, shards=2)
    delta = plan.tangent().delta_dict()
    for shard in plan.shards():
        job.save(plan, plan.job(shard.name), delta)
    return plan


def stale(plan: Plan) -> Path:
    """Removes a sample from the plan; returns the delta that is out of date now."""
    path = plan.result_path(plan.job("shard-0").hash)
    sample = plan.job("shard-0").samples[0].id
    plan.manifest.remove({"shard-0": [sample]})
    return path


def test_a_stale_delta_goes(plan: Plan) -> None:
    settle(plan)
    old = stale(plan)
    os.link(old, plan.path / "link")
    assert settle(plan).missing == ("shard-0",)
    assert not old.exists()
    assert not any((plan.path / "link").read_bytes())


def test_the_delta_of_a_shard_that_is_forgotten_as_a_whole_goes(plan: Plan) -> None:
    settle(plan)
    old = plan.result_path(plan.job("shard-0").hash)
    plan.manifest.remove({"shard-0": [sample.id for sample in plan.job("shard-0").samples]})
    assert settle(plan).forgotten == ("shard-0",)
    assert not old.exists()


@pytest.mark.parametrize("name", ["mine.safetensors", "backup.safetensors", "0.tmp", "notes.txt"])
def test_a_users_file_stays(plan: Plan, name: str) -> None:
    mine = plan.results_path / name
    shutil.copy(plan.result_path(plan.job("shard-0").hash), mine)
    old, before = stale(plan), mine.read_bytes()
    settle(plan)
    assert mine.read_bytes() == before
    assert not old.exists()


@pytest.mark.parametrize("different", ["anchor", "job"])
def test_a_delta_of_another_run_stays(plan: Plan, different: str) -> None:
    """Its name looks like that of a delta of this run, its meta does not."""
    delta = load_delta(plan.result_path(plan.job("shard-0").hash))
    assert delta.meta is not None
    mine = plan.results_path / f"{'a' * 32}.safetensors"
    meta = replace(delta.meta, extra={"job": "a" * 64})
    other = {"anchor": replace(meta, anchor="b" * 64), "job": replace(meta, extra={})}
    save_delta(delta, mine, meta=other[different])
    before = mine.read_bytes()
    settle(plan)
    assert mine.read_bytes() == before
    save_delta(delta, mine, meta=meta)  # and now it is this run's
    settle(plan)
    assert not mine.exists()


def test_what_nobody_can_tell_is_named_and_stays(plan: Plan, tmp_path: Path) -> None:
    """Deltas that are out of date are erased first."""
    settle(plan)
    old = stale(plan)
    damaged = plan.results_path / f"{'0' * 32}.safetensors"
    damaged.write_text("mine")
    with pytest.raises(PlanError, match=rf"{damaged.name} is truncated.*remove it if it is one"):
        settle(plan)
    assert damaged.read_text() == "mine" and not old.exists()
    damaged.unlink()

    precious = tmp_path / "precious"
    precious.write_text("mine")
    damaged.symlink_to(precious)
    with pytest.raises(PlanError, match=rf"{damaged.name} is a symbolic link"):
        settle(plan)
    assert precious.read_text() == "mine" and damaged.is_symlink()
    damaged.unlink()

    os.mkfifo(damaged)
    with pytest.raises(PlanError, match=rf"{damaged.name}: Not a regular file"):
        settle(plan)
    damaged.unlink()
    settle(plan)


def test_a_link_in_place_of_a_delta_is_refused(plan: Plan, tmp_path: Path) -> None:
    """`forget` could not erase the link's target."""
    path = plan.result_path(plan.job("shard-0").hash)
    shutil.move(path, tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(PlanError, match=rf"{path.name} is a symbolic link"):
        settle(plan)
    path.unlink()
    path.mkdir()
    with pytest.raises(PlanError, match=rf"{path.name}: it is a folder"):
        settle(plan)


@pytest.mark.parametrize("name", ["deltas", "ledger", ".lock"])
def test_a_link_out_of_the_run_is_refused(plan: Plan, tmp_path: Path, name: str) -> None:
    """Through a link `settle` would erase another run's files and forget its shards."""
    settle(plan)
    other = make_plan(tmp_path, shards=3, run="other")
    job.save(other, other.job("shard-2"), other.tangent().delta_dict())
    settle(other)
    mine, theirs = plan.path / name, other.path / name
    shutil.rmtree(mine) if mine.is_dir() else mine.unlink()
    mine.symlink_to(theirs)
    before = bits(other)
    with pytest.raises(PlanError, match=rf"run/{name} is a symbolic link"):
        settle(plan)
    assert bits(other) == before
    assert [entry.shard for entry in Ledger(other.ledger_path, create=False).list()] == ["shard-2"]


def test_a_pipe_in_place_of_the_lock_is_refused(plan: Plan) -> None:
    (plan.path / ".lock").unlink(missing_ok=True)
    os.mkfifo(plan.path / ".lock")
    with pytest.raises(PlanError, match=r"\.lock is no file"):
        settle(plan)


def test_the_run_itself_may_be_reached_by_a_link(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(plan.path)
    assert settle(Plan.open(tmp_path / "link")).added == ("shard-0", "shard-1")
    composed = Ledger(plan.ledger_path, create=False).composed()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in composed.values())
