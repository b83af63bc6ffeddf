"""What finetune, compose and forget say of a run: tables, accuracies, lines, what comes next."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_runs
import numpy as np
import pytest
import torch
from cli_runs import parsed, refused, run
from shard_runs import image_folder, run_here
from typer.testing import Result

from tangent_ops import Delta, load_delta
from tangent_ops.cli import training
from tangent_ops.shards import Plan
from tangent_ops.shards.history import history_path

WIDE = {"COLUMNS": "120"}


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tangent_ops.shards.run.run_local", run_here)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images; a third of the validation images is in the folder of another class."""
    folder = tmp_path_factory.mktemp("images")
    image_folder(folder / "private", each=4)
    image_folder(folder / "public", each=3, seed=1)
    valid = image_folder(folder / "valid", each=6, seed=2)
    for number in (0, 1):
        for index in range(3):
            name = f"{number}-{index}.png"
            (valid / f"class{index}" / f"{number}.png").rename(valid / f"class{index + 1}" / name)
    return folder


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of two shards, trained in three epochs, and what the command printed."""
    out = tmp_path_factory.mktemp("run") / "the run"
    return out, finetune(images, out)


@pytest.fixture
def copied(begun: tuple[Path, Result], tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(begun[0], tmp_path / "the run"))


def finetune(images: Path, out: Path, *words: object) -> Result:
    options = ("--shards", 2, "--epochs", 3, "--lr", 1e-2, "--validation", images / "valid")
    return cli_runs.finetune(images / "private", out, *options, *words)


def right(plan: Plan, delta: Delta | None) -> np.ndarray:
    """Which validation images are classified correctly."""
    assert plan.validation is not None
    tangent = plan.tangent().eval()
    if delta is not None:
        tangent.load_delta_dict(delta)
    samples = plan.validation.open(plan.anchor_info.input)
    inputs, targets = zip(*samples, strict=True)
    with torch.no_grad():
        return (tangent(torch.stack(inputs)).argmax(dim=1) == torch.tensor(targets)).numpy()


def of(plan: Plan, shard: str) -> Delta:
    return load_delta(plan.result_path(plan.job(shard).hash))


def test_finetune_ends_with_a_table(images: Path, begun: tuple[Path, Result]) -> None:
    out, result = begun
    assert result.exit_code == 0, result.output
    plan = Plan.open(out)
    summary = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    for name in ("shard-0", "shard-1"):
        rows = [row for row in summary if row["shard"] == name]
        (line,) = [line for line in result.stdout.splitlines() if f"│ {name} " in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        losses = [float(row["train_loss"]) for row in rows]
        accuracies = [float(row["eval_top1"]) for row in rows]
        assert cells[1] == str(len(plan.job(name).samples))
        assert cells[2] == f"{losses[0]:.3g} to {losses[-1]:.3g}"
        assert cells[3] == f"{100 * right(plan, of(plan, name)).mean():.1f}%"
        assert accuracies[-1] == pytest.approx(100 * right(plan, of(plan, name)).mean())
        best = int(np.argmax(accuracies))
        assert cells[4] == f"{best}: {accuracies[best]:.1f}%"
        assert [(row["epoch"], float(row["lr"])) for row in rows] == [
            (str(epoch), pytest.approx(1e-2 * (1 + np.cos(np.pi * epoch / 3)) / 2))
            for epoch in range(3)
        ]
    assert len(summary) == 6
    assert "looks better than it is" in result.stdout
    assert result.stdout.splitlines()[-1] == f"next: tangent-ops compose '{out}'"


def test_piped_it_prints_lines(begun: tuple[Path, Result]) -> None:
    lines = [line for line in begun[1].stderr.splitlines() if line.startswith("shards: ")]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        form = rf"shards: {number + 1} of 2 done after \d+ s; shard-{number}: [\d.]+ s, "
        assert re.fullmatch(form + r"loss [\d.]+ to [\d.]+, accuracy [\d.]+%", line)


def test_many_shards_have_few_lines(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One in ten seconds, also while nothing ends, and the last."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    with training.watching(100, quiet=False) as event:
        for number in range(100):
            clock[0] += 0.5
            event(f"s{number}", {"seconds": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == [20, 40, 60, 80, 100]
    monkeypatch.setattr(training, "_EVERY", 0.01)
    monkeypatch.undo()
    monkeypatch.setattr(training, "_EVERY", 0.01)
    with training.watching(3, quiet=False):
        import time

        time.sleep(0.1)
    assert "shards: 0 of 3 done after 0 s" in capsys.readouterr().err.splitlines()


def test_programs_get_the_histories(images: Path, begun: tuple[Path, Result]) -> None:
    result = finetune(images, begun[0], "--json")
    rows = parsed(result)["shards"]
    assert [row["shard"] for row in rows] == ["shard-0", "shard-1"]
    assert all(len(row["loss"]) == len(row["accuracy"]) == 3 for row in rows)
    assert "shards:" not in result.stderr


def test_compose_and_forget_say_what_changed(copied: Path, images: Path) -> None:
    plan = Plan.open(copied)
    count = 24

    def check(found: dict[str, Any], before: Delta | None, after: Delta) -> str:
        """Compares with predictions one by one; returns what has to be printed."""
        then, now = right(plan, before), right(plan, after)
        difference = now.astype(float) - then
        error = np.sqrt(np.mean((difference - difference.mean()) ** 2) / count)
        assert found["images"] == count
        assert (found["before"], found["after"]) == pytest.approx((then.mean(), now.mean()))
        assert found["change"] == pytest.approx(difference.mean())
        assert found["standard_error"] == pytest.approx(error)
        return (
            f"{100 * then.mean():.1f}% -> {100 * now.mean():.1f}%, "
            f"{100 * difference.mean():+.1f} points (paired standard error {100 * error:.1f})"
        )

    one, two = of(plan, "shard-0"), of(plan, "shard-1")
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    again = Path(shutil.copytree(copied, copied.with_name("again")))
    words = check(parsed(run("compose", copied, "--json"))["accuracy"], None, Delta(mean))
    result = run("compose", again)
    assert f"accuracy on 24 validation images: the anchor's {words}" in result.stdout
    next_one = f"next: tangent-ops evaluate {again}"
    assert result.stdout.splitlines()[-1] == next_one
    same = run("compose", again).stdout
    assert f"{right(plan, Delta(mean)).mean():.1%}, as before" in same

    found = parsed(run("forget", copied, "--shard", "shard-0", "--json"))["accuracy"]
    words = check(found, Delta(mean), two)
    own = run("evaluate", again).stdout.splitlines()
    assert own[0].startswith(f"{images / 'valid'}: 24 images")
    assert own[-1] == f"next: tangent-ops report {again}"
    assert any(f"{right(plan, Delta(mean)).mean():.1%} of 24 images" in line for line in own)
    result = run("forget", again, "--shard", "shard-0", "--yes")
    expected = words if found["change"] or found["standard_error"] else "as before"
    assert expected in result.stdout
    assert result.stdout.splitlines()[-1] == next_one
    last = run("forget", again, "--shard", "shard-1", "--yes").stdout
    assert "accuracy" not in last and "next" not in last


def test_without_the_images_the_work_is_done(copied: Path, images: Path) -> None:
    valid = images / "valid"
    valid.rename(images / "away")
    try:
        result = run("compose", copied)
        assert result.exit_code == 0
        assert f"the accuracy was not measured: {valid} is no folder" in result.stdout
        refused(run("evaluate", copied), f"{valid} is no folder")
        done = parsed(run("forget", copied, "--shard", "shard-0", "--json"))
        assert (done["samples"] > 0, "no folder" in done["accuracy"]["not_measured"]) == (True,) * 2
        history_path(Plan.open(copied), Plan.open(copied).job("shard-1").hash).unlink()
        Plan.open(copied).result_path(Plan.open(copied).job("shard-1").hash).unlink()
        options = ("--shards", 2, "--epochs", 3, "--lr", 1e-2)
        result = cli_runs.finetune(images / "private", copied, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("the accuracy was not measured") == 1
    finally:
        (images / "away").rename(valid)


def test_the_summary_forgets(copied: Path) -> None:
    run("compose", copied)
    old = (copied / "summary.csv").read_text()
    (copied.parent / "link").hardlink_to(copied / "summary.csv")
    run("forget", copied, "--shard", "shard-0", "--yes")
    rows = (copied / "summary.csv").read_text()
    assert rows.splitlines() == [line for line in old.splitlines() if ",shard-0," not in line]
    assert (copied.parent / "link").read_bytes() == bytes(len(old))
    run("forget", copied, "--shard", "shard-1", "--yes")
    assert not (copied / "summary.csv").exists()


def test_wrong_validation_images(images: Path, tmp_path: Path) -> None:
    """They are refused before an anchor is made."""
    image_folder(tmp_path / "more", classes=5)
    for folder, said in (
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path / "more", "class 'class4'"),
        (images / "private", "is a validation image, too"),
    ):
        result = finetune(images, tmp_path / "run", "--validation", folder)
        refused(result, said)
        assert f"--validation {folder}" in result.stderr and not (tmp_path / "run").exists()


def words_of(images: Path, method: str) -> tuple[object, ...]:
    """A command for a run of two shards, without its --out."""
    public, valid = ("--public", images / "public"), ("--validation", images / "valid")
    command = ("finetune", images / "private", *cli_runs.MODEL, "--shards", 2, *public, *valid)
    steps = ("--epochs", 2) if method == "gradient" else ()
    return (*command, "--method", method, *steps)


@pytest.fixture(scope="module", params=["gradient", "exact", "statistics"])
def made(
    images: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Plan, str]:
    """A run of each method, and what the command printed."""
    out = tmp_path_factory.mktemp("methods") / request.param
    result = run(*words_of(images, request.param), "--out", out, **WIDE)
    assert result.exit_code == 0, result.output
    return request.param, Plan.open(out), result.stdout


def test_the_table_of_each_method(made: tuple[str, Plan, str]) -> None:
    method, plan, said = made
    count = len(plan.job("shard-0").samples)
    assert (method == "gradient") == ("best epoch" in said) == (plan.path / "summary.csv").exists()
    if method == "exact":
        found = re.search(rf"shard-0 +│ {count} +│ < ([\d.e-]+) +│ ([\d.]+)%", said)
        assert found and float(found[1]) > 0
        share = 100 * right(plan, of(plan, "shard-0")).mean()
        assert float(found[2]) == pytest.approx(share, abs=0.05)
    if method == "statistics":
        assert re.search(r"shard +┃ images +┃ rows", said)
        assert re.search(rf"shard-0 +│ {count} +│ {4 * count}", said)


def test_a_dry_run_tells_sizes(images: Path, tmp_path: Path, made: tuple[str, Plan, str]) -> None:
    method, plan, _ = made
    command = (*words_of(images, method), "--out", tmp_path / "run")
    found = parsed(run(*command, "--dry-run", "--json"))
    assert not (tmp_path / "run").exists()
    assert (found["weights"], found["bytes"]) == ("random", 2 * found["bytes_per_shard"])
    assert 0 < found["seconds"] < 60 and 0 < found["measured_on"] <= 8
    if method == "gradient":
        many = parsed(run(*command, "--epochs", 1000, "--dry-run", "--json"))["seconds"]
        assert many > 10 * found["seconds"]
    if method == "statistics":
        assert "numbers of each shard" in run(*command, "--dry-run").stdout
    trained = 4 * 8 * 8 + 260  # four cores and the head
    if method != "statistics":
        trained = sum(value.numel() for value in of(plan, "shard-0").values())
    assert found["parameters"] == trained
    sizes = [path.stat().st_size for path in plan.results_path.glob("*.safetensors")]
    assert len(sizes) == 2
    for size in sizes:  # and a header
        assert found["bytes_per_shard"] <= size <= found["bytes_per_shard"] + 20_000


def test_a_dry_run_of_a_run_that_is_there(images: Path, begun: tuple[Path, Result]) -> None:
    before = {path: path.read_bytes() for path in begun[0].rglob("*") if path.is_file()}
    result = finetune(images, begun[0], "--dry-run")
    assert "weights:    those of the run" in result.stdout
    assert re.search(r"trained: +[\d,]+ numbers of each shard", result.stdout)
    assert "time:       none" in result.stdout  # both are trained
    assert {p: p.read_bytes() for p in begun[0].rglob("*") if p.is_file()} == before


def test_a_dry_run_without_weights(images: Path, tmp_path: Path, monkeypatch) -> None:
    """Sizes and times do not depend on them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ("--model", "test_vit", "--img-size", "32", "--epochs", 1, "--dry-run")
    result = run("finetune", images / "private", "--out", tmp_path / "run", *options)
    assert result.exit_code == 0
    assert "weights:    not to be had: HF_HUB_OFFLINE is set" in result.stdout
    assert "measured on" in result.stdout


def test_the_head_is_told_by_images_left_out(images: Path, tmp_path: Path) -> None:
    result = finetune(images, tmp_path / "run", "--public", images / "public", "--epochs", 1)
    said = re.search(
        r"fitted to 12 public images: ([\d.]+)% of them are recog.*5-fold", result.stderr
    )
    assert said and "loss" not in result.stderr.partition("public images")[2].splitlines()[0]


def test_values_for_wandb(images: Path, tmp_path: Path, monkeypatch, not_installed) -> None:
    logged: list[dict[str, float]] = []
    calls: list[object] = []
    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    writer = types.SimpleNamespace(
        log=logged.append,
        finish=lambda: calls.append("finished"),
        define_metric=lambda *args, **kwargs: None,
    )
    fake.init = lambda project: calls.append(project) or writer
    monkeypatch.setitem(sys.modules, "wandb", fake)
    found = parsed(finetune(images, tmp_path / "run", "--wandb", "mine", "--json"))
    assert calls == ["mine", "finished"] and len(logged) == 6
    for row in found["shards"]:
        own = [values for values in logged if f"loss/{row['shard']}" in values]
        for name in ("loss", "lr", "accuracy"):
            assert [values[f"{name}/{row['shard']}"] for values in own] == row[name]
        assert [values["epoch"] for values in own] == [0, 1, 2]
    not_installed("wandb")
    refused(finetune(images, tmp_path / "other", "--wandb", "mine"), "pip install wandb")
    assert not (tmp_path / "other").exists()
