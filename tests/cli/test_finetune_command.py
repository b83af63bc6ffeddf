"""The commands on a run, from `tangent-ops finetune` to `tangent-ops export`."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import cli_runs
import pytest
import torch
from cli_runs import parsed, refused, run
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_runs import image_folder
from typer.testing import Result

from tangent_ops import load_delta
from tangent_ops.shards import Plan, job

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, seed, each in (("private", 0, 6), ("public", 1, 4), ("test", 2, 5)):
        image_folder(folder / name, each=each, seed=seed)
    return folder


def finetune(images: Path, out: Path, *words: object) -> Result:
    return cli_runs.finetune(images / "private", out, "--epochs", 2, *words)


def test_from_images_to_a_program(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = finetune(images, out, "--public", images / "public", "--shards", 3)
    assert result.exit_code == 0, result.output
    assert "3 shards trained" in result.stdout
    assert "fitted to 16 public images" in result.stderr
    again = parsed(finetune(images, out, "--public", images / "public", "--shards", 3, "--json"))
    assert (again["trained"], len(again["skipped"])) == ([], 3)

    assert run("evaluate", out, images / "test").exit_code == 2  # not composed yet
    result = run("compose", out, "--out", tmp_path / "mean.safetensors")
    assert (result.exit_code, "3 shards composed" in result.stdout) == (0, True)
    score = parsed(run("evaluate", out, images / "test", "--json"))
    assert score["samples"] == 20
    assert score["accuracy"] > 0.5
    mean = ("--delta", tmp_path / "mean.safetensors")
    found = parsed(run("evaluate", out, images / "test", "--json", *mean))
    assert found["accuracy"] == score["accuracy"]
    assert "the anchor:" in run("evaluate", out, images / "test", "--anchor-only").stdout

    told = parsed(run("inspect", out, "--shards", "--json"))
    assert (told["what"], told["trained"], told["samples"]) == ("run", 3, 24)
    assert told["anchor"]["classes"] == [f"class{k}" for k in range(4)]
    delta = out / "deltas" / told["list"][0]["delta"]
    assert parsed(run("inspect", delta, "--json"))["shard"] == "shard-0"
    assert "test_vit" in run("inspect", out / "anchor.safetensors").stdout
    assert "ledger" in run("inspect", out / "ledger").stdout

    target = Plan.open(out).job("shard-1").samples[0].id
    assert run("forget", out, "--sample", target).exit_code == 2  # it needs --yes here
    would = parsed(run("forget", out, "--sample", target, "--dry-run", "--json"))
    assert would == {"would_forget": {"shard-1": [target]}}
    done = parsed(run("forget", out, "--sample", target, "--json"))
    assert (done["samples"], done["trained"]) == (1, ["shard-1"])
    assert run("forget", out, "--sample", target, "--yes").exit_code == 2
    assert run("forget", out, "--shard", "shard-0", "--yes").exit_code == 0

    files = ("--task-vector", tmp_path / "task.safetensors")
    result = run("export", out, tmp_path / "model.pt2", *files)
    assert result.exit_code == 0, result.output
    assert run("export", out, tmp_path / "model.pt2").exit_code == 2  # it is there
    run("compose", out, "--out", tmp_path / "rest.safetensors")
    tangent = Plan.open(out).tangent()
    tangent.load_delta_dict(load_delta(tmp_path / "rest.safetensors"))
    inputs = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tangent(inputs)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(inputs), expected, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "task.safetensors").keys() == tangent.deltas().keys()


def test_by_customer_from_a_table(images: Path, tmp_path: Path) -> None:
    files = sorted((images / "private").rglob("*.png"))
    with open(tmp_path / "owners.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sample", "customer"])
        for index, path in enumerate(files):
            rows.writerow([path.relative_to(images / "private"), f"c{index % 3}"])
    out = tmp_path / "run"
    words = ("--by", "customer", "--table", tmp_path / "owners.csv")
    dry = parsed(finetune(images, out, *words, "--dry-run", "--json"))
    assert [row["shard"] for row in dry["shards"]] == ["c0", "c1", "c2"]
    assert [row["steps"] for row in dry["shards"]] == [4, 4, 4]
    assert not out.exists()
    assert finetune(images, out, *words).exit_code == 0
    run("compose", out, "--weights", "samples")
    result = run("forget", out, "--label", "c1", "--yes")
    assert "forgot 8 images of 1 shard, 1 empty now\n" in result.stdout
    assert "2 shards composed" in run("compose", out, "--weights", "samples").stdout
    dry = parsed(finetune(images, out, *words, "--dry-run", "--json"))
    assert [(row["shard"], row["done"]) for row in dry["shards"]] == [("c0", True), ("c2", True)]
    for more, said in (
        (["--l2", "0.5"], "another recipe"),
        (["--label", "sample"], "other samples"),
    ):
        for dry_run in ([], ["--dry-run"]):  # a dry run refuses the same
            refused(finetune(images, out, *words, *more, *dry_run), said)
    refused(
        finetune(images, out, "--by", "owner", "--table", tmp_path / "owners.csv"),
        "no column 'owner'",
    )


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_options_from_a_file(images: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"options.{suffix}"
    sign = "=" if suffix == "toml" else ":"
    path.write_text(f"shards {sign} 4\nbatch-size {sign} 2\nl2 {sign} 0.5\n")
    words = ("--config", path, "--dry-run", "--json", "--l2", "0.25")
    dry = parsed(finetune(images, tmp_path / "run", *words))
    assert (dry["recipe"]["l2"], dry["recipe"]["batch_size"]) == (0.25, 4)  # FAST says 4
    assert len(dry["shards"]) == 4
    for line, words in (
        (f"shard {sign} 4", "did you mean shards?"),
        (f"epochs {sign} 'many'", "epochs"),
        (f"epochs {sign} [1, 2]", "one value"),
        ("epochs", "options" if suffix == "yaml" else "cannot be read"),
        (f"epochs {sign} [", "cannot be read"),
    ):
        path.write_text(line)
        options = ("finetune", images / "private", "--out", tmp_path / "run", "--config", path)
        result = run(*options, "--dry-run")
        assert result.exit_code == 2, line
        assert words in result.output, result.output
    ini = path.with_suffix(".ini")
    ini.write_text("")
    assert "expected a .toml" in finetune(images, tmp_path / "run", "--config", ini).output


def test_what_does_not_fit_together(images: Path, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\x80\x02.")
    result = finetune(images, tmp_path / "run", "--weights", tmp_path / "w.bin")
    assert "expected a .safetensors file" in result.stderr
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    refused(
        finetune(images, tmp_path / "run", "--weights", tmp_path / "w.safetensors"), "does not fit"
    )
    refused(finetune(images, tmp_path / "run", "--public", images / "private"), "is public, too")
    assert not (tmp_path / "run").exists()

    assert finetune(images, tmp_path / "run").exit_code == 0
    refused(finetune(images, tmp_path / "run", "--seed", "1"), "recipe: --seed 0, not 1")
    refused(finetune(images, tmp_path / "run", "--l2", "1"), "another recipe")
    size = finetune(images, tmp_path / "run", "--img-size", "48")
    refused(size, "was begun with another anchor (--img-size 32, not 48)")
    run("compose", tmp_path / "run")
    for name in ("class0", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "test" / name / "x.png")
    refused(run("evaluate", tmp_path / "run", tmp_path / "test"), "class 'dog'")
    assert run("evaluate", tmp_path / "run", tmp_path / "nowhere").exit_code == 2
    assert run("inspect", tmp_path).exit_code == 2
    assert run("inspect", tmp_path / "w.bin").exit_code == 2
    assert run("compose", tmp_path).exit_code == 2


def test_classes_by_their_names(images: Path, tmp_path: Path) -> None:
    """Classes are matched by name where the test set lacks some."""
    assert finetune(images, tmp_path / "run", "--public", images / "public").exit_code == 0
    run("compose", tmp_path / "run")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "class3").symlink_to(images / "test" / "class3")
    score = parsed(run("evaluate", tmp_path / "run", tmp_path / "some", "--json"))
    whole = parsed(run("evaluate", tmp_path / "run", images / "test", "--json"))
    assert score["samples"] == 5
    assert score["accuracy"] >= 1 - 4 * (1 - whole["accuracy"]) - 1e-9 > 0


def test_a_failed_shard_ends_with_1(images: Path, tmp_path: Path) -> None:
    image_folder(tmp_path / "private")
    (tmp_path / "private" / "class0" / "0.png").write_bytes(b"no image")
    result = finetune(tmp_path, tmp_path / "run", "--shards", 2)
    assert result.exit_code == 1
    assert "1 failed" in result.stdout
    assert "class0/0.png" in result.stdout


def test_interrupted_it_ends_with_130(images: Path, tmp_path: Path, monkeypatch) -> None:
    real, trained = job.attempt, []

    def attempt(run, shard):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(shard)
        return real(run, shard)

    with monkeypatch.context() as patch:
        patch.setattr(job, "attempt", attempt)
        result = finetune(images, tmp_path / "run", "--shards", 4)
    assert result.exit_code == 130
    assert "2 of 4 shards done; the same command goes on" in result.stderr
    result = finetune(images, tmp_path / "run", "--shards", 4)
    assert "2 shards trained" in result.stdout


def test_privately(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")
    words = ("--shards", 2, "--dp-epsilon", 3, "--dp-steps", 3, "--dp-batch-size", 4)
    result = finetune(images, tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    assert "differentially private" in result.stdout or "-differential" in result.stdout
    record = parsed(run("privacy", tmp_path / "run" / "ledger", "--json"))
    assert 2.9 < record["epsilon"] <= 3
    first = sorted((tmp_path / "run" / "deltas").iterdir())
    other = finetune(images, tmp_path / "other", *words)
    assert other.exit_code == 0
    second = sorted((tmp_path / "other" / "deltas").iterdir())
    assert [path.name for path in first] == [path.name for path in second]
    for one, two in zip(first, second, strict=True):  # the noise is not drawn from the seed
        assert one.read_bytes() != two.read_bytes()


def test_losses_for_tensorboard(images: Path, tmp_path: Path) -> None:
    words = ("--tensorboard", tmp_path / "board")
    if importlib.util.find_spec("tensorboard") is None:
        refused(finetune(images, tmp_path / "run", *words), "tangent-ops[tensorboard]")
        return
    words += ("--validation", images / "test")
    assert finetune(images, tmp_path / "run", *words).exit_code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/shard-0", "lr/shard-0", "accuracy/shard-0"]
    assert [event.step for event in events.Scalars("loss/shard-0")] == [0, 1]
    assert events.Scalars("lr/shard-0")[0].value == pytest.approx(1e-3)
