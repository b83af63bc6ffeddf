"""Refusals of the commands on runs, and what these commands leave unchanged."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import MODEL, finetune, parsed, refused, run
from safetensors.torch import load_file, save_file
from shard_runs import bits, image_folder

from tangent_ops import Ledger
from tangent_ops.cli.assignment import described
from tangent_ops.errors import ArgumentError
from tangent_ops.shards import ImageData, Plan, job

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "private")


def owners(images: Path, path: Path, prefix: str = "", encoding: str = "utf-8") -> Path:
    """A table: each image's region is its class, its customer its number modulo 2."""
    with open(path, "w", newline="", encoding=encoding) as file:
        rows = csv.writer(file)
        rows.writerow(["sample", "customer", "region"])
        for image in sorted(images.rglob("*.png")):
            name = image.relative_to(images).as_posix()
            rows.writerow([prefix + name, f"c{int(image.stem) % 2}", image.parent.name])
    return path


def weights(out: Path) -> dict[str, float]:
    return {entry.shard: entry.weight for entry in Ledger(out / "ledger", create=False).list()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--blocks", "99"], "--blocks 99: k=99: expected 0 to 6"),
        (["--dp-clip", "0.5"], "--dp-clip is for a private fit: give --dp-epsilon"),
        (["--dp-steps", "100"], "--dp-steps is for a private fit"),  # though it is the default
        (["--executor", "ray"], "tangent-ops[distributed]"),
        (["--epochs", "0"], "epochs"),
        (["--blocks", "few"], "--blocks few"),
        (["--method", "exact", "--l2", "0"], "l2 > 0"),
        (["--optimizer", "lion"], "optimizer must be one of"),
        (["--model", "vit_bse_patch16_224"], "did you mean vit_base_patch16_224"),
        (["--weights", "w.bin"], "there is no such file"),
        (["--public", "nowhere"], "no such folder"),
        (["--workers", "0"], "--workers 0"),
        (["--address", "ray://x"], "--executor ray"),
        (["--proportions", "5,x"], "--proportions 5,x"),
        (["--by", "class", "--shards", "2"], "for --by hash"),
        (["--by", "customer"], "--table"),
        (["--data-name", "torch/cifar10"], "unpickling"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_refused_before_any_work(
    images: Path, tmp_path: Path, words: list[str], said: str, dry: list[str], monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(finetune(images, tmp_path / "run", *words, *dry), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow-overlap", "--shards", "2"], "disjoint"),
        (["--dp-delta", "0.2"], "the largest shard"),
    ],
)
def test_private_shards_without_a_guarantee_are_refused(
    images: Path, tmp_path: Path, words: list[str], said: str, dry: list[str]
) -> None:
    pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    refused(finetune(images, tmp_path / "run", "--dp-epsilon", "3", *words, *dry), said)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_files_is_refused_before_the_anchor(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    from tangent_ops.cli import make_anchor

    monkeypatch.setattr(make_anchor, "make_anchor", None)
    (tmp_path / "notes.txt").write_text("mine")
    refused(finetune(images, tmp_path), "other files")


def test_classes_and_their_images_are_shown(images: Path, tmp_path: Path) -> None:
    some = image_folder(tmp_path / "some", classes=2, each=3)
    (some / "class1" / "2.png").unlink()
    (some / "notes.txt").write_text("mine")
    said = "5 images of 2 classes: class0 3, class1 2"
    for words in (["--dry-run"], []):
        result = finetune(some, tmp_path / "run", *words)
        assert (result.exit_code, said in result.stdout) == (0, True), result.output
        assert "passed over: 1 files (notes.txt)" in result.stdout
        record = parsed(finetune(some, tmp_path / "run", *words, "--json"))
        assert record["classes"] == {"class0": 3, "class1": 2}
        assert record["passed_over"] == ["notes.txt"]
    run("compose", tmp_path / "run")
    assert said in run("evaluate", tmp_path / "run", some).stdout
    found = parsed(run("evaluate", tmp_path / "run", some, "--json"))
    assert found["classes"] == {"class0": 3, "class1": 2}


def test_many_classes_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    for index in range(52):
        (tmp_path / "many" / f"{index}").mkdir(parents=True)
        (tmp_path / "many" / f"{index}" / "x.png").write_bytes(b"")
    text = described(ImageData(str(tmp_path / "many")).open())
    assert text.startswith("52 images of 52 classes: 0 1, 1 1, 2 1,")
    assert text.endswith("49 1, and 2 more classes, which --json lists")


def test_data_of_one_class_are_refused(images: Path, tmp_path: Path) -> None:
    one = image_folder(tmp_path / "one", classes=1)
    for words in (["--dry-run"], []):
        refused(finetune(one, tmp_path / "run", *words), "of one class, class0")
        refused(finetune(one / "class0", tmp_path / "run", *words), "is in no class's folder")
    refused(finetune(images, tmp_path / "run", "--public", one), f"--public {one}: all 6 images")
    assert not (tmp_path / "run").exists()


def test_labels_that_no_image_has_are_refused(images: Path, tmp_path: Path) -> None:
    table = owners(images, tmp_path / "owners.csv", prefix="./")
    refused(
        finetune(images, tmp_path / "run", "--label", "customer", "--table", table),
        "24 samples have no value",
    )
    assert not (tmp_path / "run").exists()


def test_shards_by_one_column_and_labels_by_another(images: Path, tmp_path: Path) -> None:
    table = owners(images, tmp_path / "owners.csv", encoding="utf-8-sig")  # as spreadsheets write
    words = ("--by", "customer", "--label", "region", "--table", table)
    assert finetune(images, tmp_path / "run", *words).exit_code == 0
    plan = Plan.open(tmp_path / "run")
    assert [(shard.name, shard.samples) for shard in plan.shards()] == [("c0", 12), ("c1", 12)]
    found = plan.find(label="class2")
    assert {shard: len(ids) for shard, ids in found.items()} == {"c0": 3, "c1": 3}
    assert all(id.startswith("class2/") for ids in found.values() for id in ids)


def test_weights_of_another_model_are_refused(images: Path, tmp_path: Path) -> None:
    assert finetune(images, tmp_path / "run").exit_code == 0
    state = load_file(tmp_path / "run" / "anchor.safetensors")
    save_file(state, tmp_path / "same.safetensors")
    save_file({**state, "blocks.0.ls1.gamma": torch.ones(64)}, tmp_path / "more.safetensors")
    refused(
        finetune(images, tmp_path / "a", "--weights", tmp_path / "more.safetensors"),
        "blocks.0.ls1.gamma",
    )
    result = finetune(images, tmp_path / "b", "--weights", tmp_path / "same.safetensors")
    assert (result.exit_code, "its head is that of the weights" in result.stderr) == (0, True)
    found = load_file(tmp_path / "b" / "anchor.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    refused(
        finetune(images, tmp_path / "c", "--anchor", tmp_path / "run" / "anchor.safetensors"),
        "leave --model out",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epochs = true", "epochs is not a switch, got True"),
        ("epochs = 2.7", "epochs must be an integer, got 2.7"),
        ("augment = 1", "augment must be true or false, got 1"),
    ],
)
def test_types_in_a_file(images: Path, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "o.toml").write_text(line)
    words = ("--out", tmp_path / "run", *MODEL, "--config", tmp_path / "o.toml", "--dry-run")
    refused(run("finetune", images, *words), said)


def test_weights_stay_until_others_are_asked_for(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--shards", 3, "--label", "region", "--table", owners(images, tmp_path / "owners.csv"))
    assert finetune(images, out, *words).exit_code == 0
    sizes = {shard.name: float(shard.samples) for shard in Plan.open(out).shards()}
    assert len(set(sizes.values())) > 1
    run("compose", out, "--weights", "samples")
    again = parsed(run("compose", out, "--json"))
    assert (again["added"], again["forgotten"], weights(out)) == ([], [], sizes)
    assert run("forget", out, "--label", "class1", "--yes").exit_code == 0  # of every shard
    left = {shard.name: float(shard.samples) for shard in Plan.open(out).shards()}
    assert sum(left.values()) == 18
    assert weights(out) == left
    run("compose", out, "--weights", "uniform")
    assert set(weights(out).values()) == {1.0}


def test_nothing_is_forgotten_by_a_command_that_is_refused(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "run"
    finetune(images, out)
    run("compose", out)
    before = bits(Plan.open(out))
    for wrong in ("--workers=0", "--executor=ray", "--retries=-1", "--address=ray://head:1"):
        result = run("forget", out, "--sample", "class1/1.png", "--yes", wrong)
        assert result.exit_code == 2, wrong
        assert Plan.open(out).find(sample="class1/1.png")
        assert bits(Plan.open(out)) == before
        assert len(Ledger(out / "ledger", create=False)) == 1


def test_a_run_whose_images_have_moved(images: Path, tmp_path: Path) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(images, old)
    other = image_folder(tmp_path / "other", seed=7)
    finetune(old, out, "--shards", 2)
    run("compose", out)
    first, *_ = [sample.id for sample in Plan.open(out).job("shard-0").samples]
    before = bits(Plan.open(out))
    old.rename(new)
    for words, said in (
        ((), "If the images have moved, give their place: --data FOLDER"),
        (("--data", other), "23 of 23 images are not what they were"),
        (("--data", other, "--dry-run"), "23 of 23 images are not what they were"),
        (("--data", tmp_path / "nowhere"), "nowhere is no folder"),
    ):
        refused(run("forget", out, "--sample", first, "--yes", *words), said)
    assert Plan.open(out).find(sample=first)
    assert bits(Plan.open(out)) == before
    assert len(Ledger(out / "ledger", create=False)) == 2
    dry = run("forget", out, "--sample", first, "--data", new, "--dry-run")
    assert (dry.exit_code, Plan.open(out).data.root) == (0, str(old))
    done = parsed(run("forget", out, "--sample", first, "--data", new, "--json"))
    assert (done["samples"], done["trained"]) == (1, ["shard-0"])
    assert Plan.open(out).data.root == str(new)
    assert "2 shards composed" in run("compose", out).stdout


def test_finetune_goes_on_where_the_images_are_now(images: Path, tmp_path: Path) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(images, old)
    other = image_folder(tmp_path / "other", seed=7)
    finetune(old, out, "--shards", 2)
    deltas = sorted((out / "deltas").glob("*.safetensors"))
    deltas[0].unlink()
    for dry in (["--dry-run"], []):  # the same names, but other images
        refused(finetune(other, out, "--shards", 2, *dry), "24 of 24 images are not what")
    assert [path.exists() for path in deltas] == [False, True]
    shutil.copytree(old, new)
    shutil.rmtree(old)
    assert finetune(new, out, "--shards", 2, "--dry-run").exit_code == 0
    assert Plan.open(out).data.root == str(old)
    result = finetune(new, out, "--shards", 2)
    assert (result.exit_code, "1 shard trained" in result.stdout) == (0, True), result.output
    assert f"of {old}, are read in {new} now" in result.stderr
    assert Plan.open(out).data.root == str(new)
    assert "are read in" not in finetune(new, out, "--shards", 2).stderr


def test_several_samples_are_forgotten_in_one_call(images: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(images, mine)
    finetune(mine, out)
    for name in ("class0/0.png", "class2/3.png"):
        (mine / name).unlink()
    refused(run("forget", out, "--sample", "class0/0.png", "--yes"), "--sample for each")
    (tmp_path / "o.toml").write_text('sample = "class0/0.png"')
    would = run("forget", out, "--config", tmp_path / "o.toml", "--dry-run", "--json")
    assert json.loads(would.stdout)["would_forget"] == {"shard-0": ["class0/0.png"]}
    both = ("--sample", "class0/0.png", "--sample", "class2/3.png")
    result = run("forget", out, *both, "--yes")
    assert (result.exit_code, "forgot 2 images" in result.stdout) == (0, True), result.output


def test_an_interruption_says_whether_anything_is_forgotten(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "run"
    finetune(images, out)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tangent_ops.shards.forget", interrupted)
        result = run("forget", out, "--sample", "class1/1.png", "--yes")
    refused(result, "nothing was forgotten yet", 130)
    with monkeypatch.context() as patch:
        patch.setattr(job, "attempt", interrupted)
        result = run("forget", out, "--sample", "class1/1.png", "--yes")
    refused(result, "out of the plan", 130)


def test_a_failure_says_that_the_images_are_gone(images: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    finetune(images, out)

    def unreachable(*_, **__):
        raise ArgumentError("no cluster answers")

    monkeypatch.setattr("tangent_ops.shards.run.run_local", unreachable)
    result = run("forget", out, "--sample", "class1/1.png", "--yes")
    assert result.exit_code == 1
    assert re.search("no cluster answers.*out of the plan.*finetune", result.stderr, re.DOTALL)
    with pytest.raises(ArgumentError, match="no sample"):
        Plan.open(out).find(sample="class1/1.png")


def test_private_shards_that_all_fail_are_told_of(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")
    monkeypatch.setattr(job, "attempt", lambda run, shard: {"error": "the disk is full"})
    result = finetune(images, tmp_path / "run", "--dp-epsilon", "3", "--dp-steps", "2", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["failed"] == {"shard-0": "the disk is full"}
    assert "privacy" not in found


def test_files_that_are_there(images: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "run", tmp_path / "mine.safetensors"
    finetune(images, out, "--shards", 2)
    mine.write_bytes(b"mine")
    result = run("compose", out, "--out", mine)
    assert (result.exit_code, mine.read_bytes()) == (2, b"mine")
    assert run("compose", out, "--out", mine, "--force").exit_code == 0
    assert parsed(run("inspect", mine, "--json"))["what"] == "delta"
    dry = finetune(images, out, "--shards", 2, "--dry-run")
    assert "0 of 2 shards would be trained" in dry.stdout
    torch.save({"x": 1}, tmp_path / "x.pt")
    refused(run("inspect", tmp_path / "x.pt"), "no exported program")
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04")
    assert "damaged archive" in run("inspect", tmp_path / "cut.pt2").stderr
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "p.pt2")
    assert parsed(run("inspect", tmp_path / "p.pt2", "--json"))["what"] == "program"
