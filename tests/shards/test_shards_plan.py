"""Plans: job hashes, assignments, anchors, recipes and what is refused."""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from shard_runs import OPTIONS, anchor_file, image_folder, make_plan
from shard_runs import create_plan as create

from tangent_ops.errors import ArgumentError, PlanError, SampleError
from tangent_ops.shards import ImageData, Plan, ShardRecipe, load_anchor, read_anchor, save_anchor
from tangent_ops.shards.job import job_data
from tangent_ops.shards.jobs import job_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image_folder(tmp_path / "images")
    anchor_file(tmp_path / "anchor.safetensors")
    return tmp_path


def test_a_plan_of_a_relative_folder_works_elsewhere(folder: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    data = ImageData("images")
    plan = Plan.create(
        "relative",
        anchor="anchor.safetensors",
        data=data,
        recipe=ShardRecipe(),
        assignment={"a": data.open().ids[:2]},
        progress=False,
    )
    monkeypatch.chdir(tmp_path)
    assert Path(plan.data.root) == folder / "images"
    assert len(job_data(plan, plan.job("a"))[0][0]) == 3


def test_a_job_is_what_determines_its_delta(folder: Path) -> None:
    plan = make_plan(folder)
    job = plan.job("shard-0")
    assert job.hash == plan.shards()[0].job
    info, first = plan.anchor_info, job.samples[0]
    others = [
        job_hash("shard-x", job.samples, info, plan.recipe),
        job_hash("shard-0", job.samples[1:], info, plan.recipe),
        job_hash("shard-0", job.samples[::-1], info, plan.recipe),
        job_hash("shard-0", job.samples, replace(info, fingerprint="0" * 64), plan.recipe),
        job_hash("shard-0", job.samples, replace(info, input={**info.input, "mean": []}),
                 plan.recipe),
        *(
            job_hash("shard-0", (replace(first, **change), *job.samples[1:]), info, plan.recipe)
            for change in ({"id": "x"}, {"target": first.target + 1}, {"content": "0" * 64})
        ),
        *(
            job_hash("shard-0", job.samples, info, replace(plan.recipe, **change))
            for change in ({"seed": 1}, {"threads": 2}, {"epochs": 7}, {"loss": "cross-entropy"},
                           {"rank": 2}, {"l2": 1e-9}, {"blocks": None}, {"augment": True})
        ),
    ]  # fmt: skip
    assert len({job.hash, *others}) == len(others) + 1
    # The hash does not depend on the folder, on labels or on other shards.
    labelled = (replace(first, label="customer"), *job.samples[1:])
    assert job_hash("shard-0", labelled, replace(info, origin="x"), plan.recipe) == job.hash
    shutil.copytree(folder / "images", folder / "moved" / "images")
    shutil.copy(folder / "anchor.safetensors", folder / "moved")
    assert make_plan(folder / "moved").job("shard-0") == job


def test_a_worker_reads_its_own_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite gives a job as many rows in a plan of 6 shards as in one of 24."""
    ids = ImageData(str(folder / "images")).open().ids
    connect, counts = sqlite3.connect, []
    for shards in (6, 24):
        path = create(folder, {f"s-{k}": [ids[k]] for k in range(shards)}, run=f"{shards}").path
        rows: list[tuple] = []

        def counting(*args, rows=rows, **kwargs) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.row_factory = lambda _, row: rows.append(row) or row
            return connection

        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", counting)
            Plan.open(path).job(f"s-{shards - 1}")
        counts.append(len(rows))
    assert counts[0] == counts[1] > 1


def test_a_job_has_its_samples_in_order(folder: Path) -> None:
    plan = make_plan(folder)
    ids = [sample.id for sample in plan.job("shard-1").samples]
    assert ids == sorted(ids)
    refused(ArgumentError, "no shard 'x'", plan.job, "x")


def test_assignments_that_are_none(folder: Path) -> None:
    for assignment, words in (
        ({}, "no samples"),
        ({"a": []}, "no samples"),
        ({"": ["class0/0.png"]}, "printable"),
        ({"a\nb": ["class0/0.png"]}, "printable"),
        ({"a" * 201: ["class0/0.png"]}, "printable"),
        ({"a": "class0/0.png"}, "list of ids"),
        ({"a": ["class0/0.png", "class0/0.png"]}, "twice"),
        ({"a": ["class0/none.png"]}, "not in the data"),
        ({"a": ["class0/0.png"], "b": ["class0/0.png"]}, "is in shard 'a', too"),
    ):
        refused(ArgumentError, words, create, folder, assignment)
        assert not (folder / "run").exists()


def test_a_plan_of_one_class_is_refused(folder: Path) -> None:
    for index in (1, 2, 3):
        shutil.rmtree(folder / "images" / f"class{index}")
    with pytest.raises(ArgumentError, match="images: all 6 images are of one class, class0"):
        create(folder, {"a": ["class0/0.png"]})
    assert not (folder / "run").exists()


def test_odd_names(folder: Path) -> None:
    images = folder / "images" / "class0"
    (images / "ü ö 'x'; --.png").write_bytes((images / "0.png").read_bytes() + b"\0")
    plan = create(folder, {'../../up / "ä"': ["class0/ü ö 'x'; --.png"], "%s": ["class0/0.png"]})
    names = [shard.name for shard in plan.shards()]
    assert names == ['../../up / "ä"', "%s"]
    for name in names:  # a name is never a path
        path = plan.result_path(plan.job(name).hash)
        assert path.resolve().parent == (folder / "run" / "deltas").resolve()
    assert plan.find(sample="class0/ü ö 'x'; --.png").keys() == {names[0]}


def test_a_file_name_that_is_no_text(folder: Path) -> None:
    name = os.fsencode(folder / "images" / "class0") + b"/\xff.png"
    with open(name, "wb") as file:
        file.write((folder / "images" / "class0" / "1.png").read_bytes() + b"\0")
    data = ImageData(str(folder / "images"))
    refused(ArgumentError, "do not print", create, folder, {"all": data.open().ids})


def test_a_sample_that_cannot_be_read(folder: Path) -> None:
    (folder / "images" / "class0" / "0.png").unlink()
    (folder / "images" / "class0" / "0.png").symlink_to(folder / "nowhere")
    refused(SampleError, r"class0/0\.png.*cannot be read", create, folder, {"a": ["class0/0.png"]})


def test_private_plans(folder: Path) -> None:
    private = ShardRecipe(dp_epsilon=3.0, dp_delta=1e-5)
    ids = ["class0/0.png", "class0/1.png"]
    shutil.copy(folder / "images" / "class0" / "0.png", folder / "images" / "class0" / "1.png")
    with pytest.raises(ArgumentError, match=r"1\.png' is a copy of 'class0/0\.png'"):
        create(folder, {"a": ids}, recipe=private)
    with pytest.raises(ArgumentError, match="disjoint"):
        create(folder, {"a": ids[:1]}, recipe=private, allow_overlap=True)
    others = {"a": ["class1/0.png", "class1/1.png"]}
    with pytest.raises(ArgumentError, match="below one over the 2 samples"):
        create(folder, others, recipe=replace(private, dp_delta=0.5))


def test_public_images_are_no_samples(folder: Path) -> None:
    public = image_folder(folder / "public", each=1, seed=9)
    create(folder, {"a": ["class0/0.png"]}, public=ImageData(str(public)), run="apart")
    shutil.copy(folder / "images" / "class0" / "0.png", public / "class1" / "other.png")
    with pytest.raises(
        ArgumentError, match=r"class0/0\.png' is public, too, as 'class1/other\.png'"
    ):
        create(folder, {"a": ["class0/0.png"]}, public=ImageData(str(public)))


def test_another_anchor_in_its_place(folder: Path) -> None:
    plan = make_plan(folder)
    model, info = load_anchor(plan.anchor_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_anchor(model, plan.anchor_path, name=info.name, options=info.options)
    refused(PlanError, "not the anchor of the plan", Plan.open, plan.path)


def test_an_anchor_comes_back(folder: Path) -> None:
    path = folder / "anchor.safetensors"
    model, info = load_anchor(path)
    stored = load_file(path)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert (info.name, info.options) == ("test_vit", OPTIONS)
    assert info.input["input_size"] == [3, 32, 32]
    assert not model.training
    save_anchor(model, folder / "again", name="test_vit", options=OPTIONS, classes=info.classes)
    assert (folder / "again").read_bytes() == path.read_bytes()
    for name, options, words in (
        ("hf-hub:timm/test_vit", OPTIONS, "no architecture"),
        ("local-dir:/tmp", OPTIONS, "no architecture"),
        ("no_such_model", OPTIONS, "no architecture"),
        ("test_vit", {**OPTIONS, "checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("test_vit", {**OPTIONS, "pretrained": True}, "pretrained"),
        ("test_vit", {"img_size": 32}, "num_classes"),
        ("test_vit", {**OPTIONS, "num_classes": 3}, "differs"),
        ("vit_tiny_patch16_224", {"num_classes": 4}, "differs"),
    ):
        with pytest.raises(ArgumentError, match=words):
            save_anchor(model, folder / "none", name=name, options=options)
    assert not (folder / "none").exists()
    assert read_anchor(path).origin == ""


def test_recipes() -> None:
    recipe = ShardRecipe(rank=4, l2=1)
    assert recipe == ShardRecipe.from_dict(recipe.to_dict()) == ShardRecipe(rank=4, l2=1.0)
    refused(ArgumentError, "did you mean epochs", ShardRecipe.from_dict, {"epoch": 3})
    for wrong in (
        {"epochs": 0}, {"epochs": 1.5}, {"epochs": True}, {"lr": float("nan")}, {"lr": "1"},
        {"loss": "l1"}, {"method": "exact"}, {"seed": -1}, {"rank": 0}, {"augment": 1},
        {"dp_epsilon": 1.0}, {"dp_delta": 1e-5}, {"dp_epsilon": 1.0, "dp_delta": 1.0},
        {"method": "exact", "l2": 1.0, "augment": True}, {"tol": 1.0}, {"blocks": -1},
        {"dp_epsilon": 1.0, "dp_delta": 1e-5, "accumulate": 2},
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            ShardRecipe(**wrong)  # pyright: ignore[reportArgumentType]


def test_what_private_shards_train_with() -> None:
    pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    from tangent_ops.privacy import Privacy

    assert ShardRecipe().privacy(9) is None
    recipe = ShardRecipe(dp_epsilon=3.0, dp_delta=1e-5)
    assert recipe.privacy(900) == Privacy(delta=1e-5, target_epsilon=3.0, max_grad_norm=1.0)
    assert recipe.privacy(9) == replace(recipe.privacy(900), expected_batch_size=9)


def test_interrupted_before_its_end(folder: Path) -> None:
    """The plan's file is written last, so an unfinished run is started again."""
    assignment = {"a": ["class0/0.png"]}
    (folder / "run" / "deltas").mkdir(parents=True)
    shutil.copy(folder / "anchor.safetensors", folder / "run" / "anchor.safetensors")
    (folder / "run" / ".0123456789abcdef.tmp").write_bytes(b"half")
    create(folder, assignment)
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("...")
    refused(PlanError, "other files", create, folder, assignment, run="other")
