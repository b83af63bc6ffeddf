"""Messages of the commands on runs: what they name, and the way out."""

from __future__ import annotations

import csv
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_runs import FAST, MODEL, complaint, finetune, refused, run
from shard_runs import image_folder

from tangent_ops.checks import suggestion

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "private")


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two shards, with labels, of which nothing is trained."""
    folder = tmp_path_factory.mktemp("begun")
    with open(folder / "owners.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sample", "customer"])
        for image in sorted(images.rglob("*.png")):
            name = image.relative_to(images).as_posix()
            rows.writerow([name, f"customer-{int(image.stem) % 2}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tangent_ops.shards.run.run_local", lambda *_, **__: None)
        words = ("--by", "customer", "--table", folder / "owners.csv")
        assert finetune(images, folder / "run", *words).exit_code == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--label", "custmer-1"), "did you mean 'customer-1'"),
        (("--label", "Customer-1"), "did you mean 'customer-1'"),
        (("--label", "nobody"), "Its labels are 'customer-0', 'customer-1'"),
        (("--shard", "shard-0"), "Its shards with samples are 'customer-0', 'customer-1'"),
        (("--sample", "class1/11.png"), "did you mean 'class1/1.png'"),
        (("--sample", "/data/class3/1.png"), "did you mean 'class0/1.png' or 'class1/1.png'"),
        (("--sample", "x"), "It has 24 samples, such as 'class0/0.png'"),
    ],
)
def test_an_unknown_name_gets_the_known_ones(begun: Path, words, said: str) -> None:
    refused(run("forget", begun, *words, "--yes"), said)


def test_a_plan_without_labels_says_so() -> None:
    assert suggestion("x", [], "labels") == "; it has no labels"


def test_many_names_are_not_compared_one_by_one() -> None:
    known = [f"a/{index}.png" for index in range(100_000)]
    assert suggestion("b/77.png", known, "samples") == ": did you mean 'a/77.png'?"
    assert suggestion("x", known, "samples").endswith("has 100000 samples, such as 'a/0.png'")


def test_only_the_options_that_differ_are_named(images: Path, begun: Path) -> None:
    owners = ("--by", "customer", "--table", begun.parent / "owners.csv")
    for dry in ([], ["--dry-run"]):
        result = finetune(images, begun, *owners, "--batch-size", "8", "--rank", "2", *dry)
        message = complaint(result)
        assert "recipe: --batch-size 4, not 8; --rank none, not 2. Give the same" in message
        assert "epochs" not in message
        overlap = complaint(finetune(images, begun, *owners, "--allow-overlap", *dry))
        assert "--allow-overlap false, not true" in overlap


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "0"], "--epochs must be an integer of at least 1, got 0"),
        (["--dp-delta", "0.5", "--dp-epsilon", "1"], "--dp-delta 0.5 is not below one over the 24"),
        (["--dp-epsilon", "1", "--amp"], "--amp is not for private fits"),
        (["--dp-epsilon", "1", "--dp-batch-size", "nan"], "--dp-batch-size must be positive"),
    ],
)
@pytest.mark.skipif(find_spec("opacus") is None, reason="the extra privacy is not installed")
def test_options_are_named_as_they_are_given(images: Path, tmp_path: Path, words, said) -> None:
    out = ("--out", tmp_path / "run", *MODEL)
    assert said in complaint(run("finetune", images, *out, *FAST, *words))


def test_paths_are_not_mistaken_for_options(tmp_path: Path) -> None:
    folder = tmp_path / "batch_size"
    message = complaint(run("evaluate", folder, folder))
    assert f"{folder} does not exist" in message


def test_what_costs_nothing_is_checked_before_the_anchor_is_made(
    images: Path, begun: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("tangent_ops.cli.make_anchor.make_anchor", None)
    for words in ((), ("--dry-run",)):
        same = finetune(images, tmp_path / "run", "--public", images, *words)
        refused(same, "is public, too, as 'class0/0.png'")
        (tmp_path / "file").write_bytes(b"")
        inside = finetune(images, tmp_path / "file" / "run", *words)
        refused(inside, f"because {tmp_path / 'file'} is a file")
        refused(finetune(images, begun, "--shards", "2", *words), "another assignment")
    monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
    refused(finetune(images, tmp_path / "run"), f"no permission in {tmp_path}")


def test_a_copy_among_the_public_images_is_found_by_its_content(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("tangent_ops.cli.make_anchor.make_anchor", None)
    public = image_folder(tmp_path / "public", seed=1)
    (public / "class2" / "copy.png").write_bytes((images / "class3" / "4.png").read_bytes())
    result = finetune(images, tmp_path / "run", "--public", public)
    refused(result, "sample 'class3/4.png' is public, too, as 'class2/copy.png'")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "it is a folder"),
        ("there.pt2", "it exists: give another name, or --force"),
        ("nowhere/x.pt2", "there is no folder"),
    ],
)
def test_files_are_checked_before_anything_is_computed(
    begun: Path, tmp_path: Path, name: str, said: str, monkeypatch
) -> None:
    monkeypatch.setattr("tangent_ops.shards.Plan.open", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.pt2").write_bytes(b"mine")
    for words in (
        ("export", begun, tmp_path / name),
        ("export", begun, "--task-vector", tmp_path / name),
        ("compose", begun, "--out", tmp_path / name),
        ("ledger", "export", begun / "ledger", tmp_path / name),
    ):
        assert said in complaint(run(*words))
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
