"""``tangent-ops predict``: its table is that of the model, computed in another way."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import complaint, refused, run
from PIL import Image
from safetensors.torch import load_file
from shard_runs import make_plan, trained
from timm.data.transforms_factory import create_transform
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops.shards import Plan, load_anchor, settle

CLASSES = [f"class{index}" for index in range(4)]


def outputs(folder: Path, image: Path) -> torch.Tensor:
    """f + J Δw for the mean of the shards' deltas, by torch.func.jvp of timm's own model."""
    model, info = load_anchor(folder / "run" / "anchor.safetensors")
    deltas = [load_file(path) for path in (folder / "run" / "deltas").glob("*.safetensors")]
    mean = {name: sum(delta[name] for delta in deltas) / len(deltas) for name in deltas[0]}
    weights = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    inputs = torch.stack([create_transform(**info.input)(Image.open(image).convert("RGB"))])
    tangents = {**zeros, **mean}
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(
            lambda w: torch.func.functional_call(model, w, (inputs,)), (weights,), (tangents,)
        )
    return (found[0] + found[1]).detach()[0]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_and_scores_of_a_labelled_folder(exact_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    images = exact_folder / "images"
    result = run("predict", exact_folder / "run", images, "--csv", file, "--scores")
    assert result.exit_code == 0, result.output
    said = f"wrote {file}: 24 predictions of the composition of 3 shards (mean)"
    assert said in result.stderr
    assert result.stdout == ""
    found = rows(file.read_text())
    assert [row["path"] for row in found][:2] == ["class0/0.png", "class0/1.png"]
    assert len(found) == 24
    for row in found[::7]:
        expected = outputs(exact_folder, images / row["path"])
        scores = torch.tensor([float(row[f"score:{name}"]) for name in CLASSES])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        assert row["prediction"] == CLASSES[int(expected.argmax())]
        assert float(row["score"]) == pytest.approx(float(expected.max()), rel=1e-4)


def test_unlabelled_folders_in_natural_order_without_hidden_files(
    exact_folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / "deep" / "er").mkdir(parents=True)
    (mine / ".hidden").mkdir()
    names = ["2.png", "10.png", "deep/er/[red]x, y.png", "deep/a\nb.png"]
    for name in (*names, ".hidden/x.png", "._2.png"):
        shutil.copy(exact_folder / "images" / "class1" / "0.png", mine / name)
    (mine / "notes.txt").write_text("mine")
    result = run("predict", exact_folder / "run", mine, "--csv", "-")
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert [row["path"] for row in found] == ["2.png", "10.png", "deep/a\nb.png", names[2]]
    assert {row["prediction"] for row in found} == {"class1"}
    assert list(found[0]) == ["path", "prediction", "score"]
    assert "passed over: 1 files (notes.txt)" in result.stderr
    one = run("predict", exact_folder / "run", mine / "10.png", "--csv", "-")
    assert rows(one.stdout) == [{**found[1], "path": "10.png"}]


def test_probabilities_of_a_run_by_cross_entropy(tmp_path: Path) -> None:
    plan = trained(make_plan(tmp_path, shards=1, loss="cross-entropy"))
    settle(plan)
    result = run("predict", plan.path, tmp_path / "images", "--csv", "-", "--scores")
    for row in rows(result.stdout)[::5]:
        shares = [float(row[f"probability:{name}"]) for name in CLASSES]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(shares)
        expected = outputs(tmp_path, tmp_path / "images" / row["path"]).softmax(0)
        assert shares == pytest.approx(expected.tolist(), rel=1e-4)
    anchor = run("predict", plan.path, tmp_path / "images", "--csv", "-", "--anchor-only")
    assert list(rows(anchor.stdout)[0]) == ["path", "prediction", "score"]  # its loss is unknown


def test_compositions_shards_and_the_anchor_differ(exact_folder: Path) -> None:
    delta = next((exact_folder / "run" / "deltas").iterdir())
    words = ("predict", exact_folder / "run", exact_folder / "images", "--csv", "-")
    found = {
        run(*words, *which).stdout
        for which in ((), ("--how", "lossless"), ("--delta", delta), ("--anchor-only",))
    }
    assert len(found) == 4
    assert run(*words, "--how", "mean").stdout == run(*words).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--how", "head"), "is not composed by 'head': tangent-ops compose --how head"),
        (("--how", "mean", "--anchor-only"), "--how and --anchor-only exclude each other"),
        (("--batch-size", "0"), "--batch-size must be an integer of at least 1"),
        (("--delta", "nowhere"), "nowhere: there is no such file or folder"),
    ],
)
def test_refusals(exact_folder: Path, words, said: str) -> None:
    base = ("predict", exact_folder / "run", exact_folder / "images", "--csv", "-")
    assert said in complaint(run(*base, *words))


def test_images_that_cannot_be_predicted(exact_folder: Path, tmp_path: Path) -> None:
    base = ("predict", exact_folder / "run")
    file = tmp_path / "p.csv"
    (tmp_path / "empty").mkdir()
    refused(run(*base, tmp_path / "empty", "--csv", file), "holds no images")
    refused(run(*base, tmp_path / "no", "--csv", file), "is no folder: give one that holds images")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    refused(
        run(*base, tmp_path / "bad", "--csv", file),
        "'x.png' is damaged, or cannot be read as an image",
    )
    assert not file.exists()
    file.write_text("mine")
    refused(run(*base, exact_folder / "images", "--csv", file), "it exists: give another name")
    assert file.read_text() == "mine"


def test_a_run_that_is_not_composed_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    result = run("predict", plan.path, tmp_path / "images", "--csv", "-")
    refused(result, "is not composed yet: settle it (tangent-ops compose)")
    assert Plan.open(plan.path).shards()
