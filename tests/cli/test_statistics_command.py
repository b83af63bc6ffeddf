"""`finetune --method statistics`, and the commands on its run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import MODEL, parsed, refused, run
from shard_runs import image_folder
from typer.testing import Result

from tangent_ops import load_delta, load_statistics
from tangent_ops.shards import Plan

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, seed, each in (("private", 0, 6), ("public", 1, 4), ("test", 2, 5)):
        image_folder(folder / name, each=each, seed=seed)
    return folder


def finetune(images: Path, out: Path, *words: object) -> Result:
    data = (images / "private", "--public", images / "public")
    return run("finetune", *data, "--out", out, *MODEL, "--core", 3, *words)


METHOD = ("--method", "statistics", "--shards", 3)


def test_from_images_to_forgetting_one(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    dry = finetune(images, out, *METHOD, "--dry-run")
    assert (dry.stdout.count("one pass"), out.exists()) == (3, False)
    result = finetune(images, out, *METHOD)
    assert "3 shards" in result.stdout, result.output
    again = parsed(finetune(images, out, "--shards", 3, "--json"))  # the run has its method
    assert (again["trained"], len(again["skipped"])) == ([], 3)
    refused(run("evaluate", out, images / "test"), "not composed yet")

    found = parsed(run("compose", out, "--out", tmp_path / "all.safetensors", "--json"))
    assert (found["how"], found["composed"]) == ("statistics", 3)
    files = sorted((out / "statistics").glob("*.safetensors"))
    total = sum((load_statistics(f) for f in files[1:]), load_statistics(files[0]))
    assert len(total) == 24
    expected = total.solve(found["l2"])
    composed = load_delta(tmp_path / "all.safetensors")
    assert all(torch.equal(composed[name], expected[name]) for name in expected)

    score = parsed(run("evaluate", out, images / "test", "--json"))
    assert list(score["models"]) == ["anchor", "head only", "statistics"]
    assert score["accuracy"] == score["models"]["statistics"]["accuracy"]
    for model in score["models"].values():  # each class has five of the 20 images
        assert sum(model["recall"].values()) / 4 == pytest.approx(model["accuracy"])
    table = run("evaluate", out, images / "test", "--per-class", COLUMNS="100").stdout
    assert all(word in table for word in ("head only", "class3", "all", "composition of 3 shards"))

    sample = Plan.open(out).job("shard-1").samples[0].id
    done = parsed(run("forget", out, "--sample", sample, "--json"))
    assert (done["subtracted"], done["trained"], done["samples"]) == (["shard-1"], [], 1)
    result = run("forget", out, "--shard", "shard-0", "--yes")
    assert "solved again without them" in result.stdout
    assert run("evaluate", out, images / "test").exit_code == 0  # it is solved
    result = run("export", out, "--task-vector", tmp_path / "task.safetensors")
    assert result.exit_code == 0, result.output
    told = parsed(run("inspect", out, "--json"))
    assert (told["recipe"]["method"], told["composed"]) == ("statistics", "2 shards")
    told = parsed(run("inspect", out / "ledger", "--json"))
    assert (told["what"], told["shards"]) == ("ledger of statistics", 2)
    told = parsed(run("inspect", min((out / "statistics").glob("*.safetensors")), "--json"))
    assert sum(told["samples by class"]) == told["samples"]
    told = parsed(run("inspect", out / "basis.safetensors", "--json"))
    assert (told["images that it remembers"], told["in full"]) == (16, ["head.bias", "head.weight"])


def test_l2_is_kept(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(images, out, *METHOD)
    assert "with l2 = 0.25, as given" in run("compose", out, "--l2", 0.25).stdout
    assert "with l2 = 0.25, as given" in run("compose", out).stdout
    assert "by generalised cross-validation" in run("compose", out, "--l2", "auto").stdout
    refused(run("compose", out, "--l2", "best"), "'auto'")
    refused(run("compose", out, "--how", "mean"), "compose it by 'statistics'")
    refused(run("compose", out, "--weights", "samples"), "weights are for a mean")


def test_what_does_not_fit_together(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    private = (images / "private", "--out", out, *MODEL)
    refused(run("finetune", *private, "--method", "statistics"), "needs --public")
    for words, said in (
        (("--epochs", 2), "--epochs is for --method gradient"),
        (("--l2", 0.1), "choose it when the run is composed"),
        (("--blocks", 0), "a block with cores"),
        (("--loss", "cross-entropy"), "is for 'rsl'"),
        (("--rank", 2), "rank is not for method 'statistics'"),
    ):
        refused(finetune(images, out, *METHOD, *words), said)
    refused(run("finetune", *private, "--core", 3), "--core is for --method statistics")
    assert not out.exists()


@pytest.mark.parametrize(
    "words, method, l2",
    [
        ((), "exact", 0.1),
        (("--l2", 0.5), "exact", 0.5),
        (("--batch-size", 4), "exact", 0.1),
        (("--l2", 0), "gradient", 0.0),
        (("--epochs", 15), "gradient", 0.0),
        (("--loss", "cross-entropy"), "gradient", 0.0),
        (("--method", "gradient"), "gradient", 0.0),
        (("--method", "exact"), "exact", 0.1),
    ],
)
def test_shards_are_fitted_exactly_unless_steps_are_asked_for(
    images: Path, tmp_path: Path, words: tuple[object, ...], method: str, l2: float
) -> None:
    given = (images / "private", "--out", tmp_path / "run", *MODEL, *words)
    recipe = parsed(run("finetune", *given, "--dry-run", "--json"))["recipe"]
    assert (recipe["method"], recipe["l2"]) == (method, l2)


def test_deltas_are_composed_side_by_side(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = (images / "private", "--public", images / "public", "--out", out, *MODEL)
    assert run("finetune", *data, "--shards", 2).exit_code == 0
    refused(run("compose", out, "--how", "least-squares"), "go together")
    refused(run("compose", out, "--how", "statistics"), "compose it by 'mean'")
    for words in (("lossless",), ("head",), ("least-squares", "--data", images / "test")):
        result = run("compose", out, "--how", *words)
        assert result.exit_code == 0, result.output
    score = parsed(run("evaluate", out, images / "test", "--json"))
    assert list(score["models"]) == ["anchor", "mean", "least-squares", "head", "lossless"]
    assert parsed(run("compose", out, "--how", "weights", "--json"))["how"] == "mean"
    assert Plan.open(out).weights == "samples"
    one = tmp_path / "one"
    data = (images / "private", "--public", images / "public", "--out", one, *MODEL)
    assert run("finetune", *data, "--tol", 1e-4).exit_code == 0
    run("compose", one, "--out", tmp_path / "one.safetensors")
    union, parts = (
        load_delta(path)
        for path in (tmp_path / "one.safetensors", out / "compositions" / "lossless.safetensors")
    )
    distance = sum(float((union[n] - parts[n]).square().sum()) for n in union) ** 0.5
    assert distance < 1e-2 * sum(float(union[n].square().sum()) for n in union) ** 0.5
    run("forget", out, "--sample", Plan.open(out).job("shard-1").samples[0].id, "--yes")
    assert list((out / "compositions").iterdir()) == []  # they are of the forgotten image, too
