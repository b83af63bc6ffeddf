"""``tangent-ops influence``: its numbers are those of runs that forget the image for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import complaint, parsed, refused, run
from PIL import Image
from shard_runs import FAST, create_plan, make_plan, trained
from timm.data.transforms_factory import create_transform

from tangent_ops.cli.influence import _short
from tangent_ops.errors import ArgumentError, LedgerError, UnsupportedError
from tangent_ops.exact.influence_grid import influence_grid
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.shards import ImageData, Plan, ShardRecipe, compose_run, forget, settle
from tangent_ops.shards.composing import composition
from tangent_ops.shards.run_influence import Influences, influences

pytest.importorskip("matplotlib", reason="the extra for plots is not installed")
pytestmark = pytest.mark.usefixtures("in_this_process")

TARGET = 2  # the class that the image is taken to be of
LABEL = torch.tensor([TARGET])


def prepared(plan: Plan, image: Path) -> torch.Tensor:
    return create_transform(**plan.anchor_info.input)(Image.open(image).convert("RGB"))


def loss(plan: Plan, how: str, image: torch.Tensor) -> float:
    tangent = plan.tangent().eval()
    tangent.load_delta_dict(composition(plan, how))
    with torch.no_grad():
        return float(RescaledSquareLoss()(tangent(image[None]), LABEL))


def change_if_forgotten(
    folder: Path, to: Path, how: str, image: torch.Tensor, sample: str
) -> float:
    """The change of the loss when a copy of the run forgets a sample, and is composed again."""
    shutil.copytree(folder / "run", to)
    plan = Plan.open(to)
    before = loss(plan, how, image)
    forget(plan, sample=sample, progress=False)
    if how == "lossless":
        compose_run(plan, how, progress=False)
    return loss(plan, how, image) - before


@pytest.fixture(scope="module")
def of_mean(exact_folder: Path) -> Influences:
    """On an image of class0, as if it were of the class TARGET."""
    plan = Plan.open(exact_folder / "run")
    image = prepared(plan, exact_folder / "images" / "class0" / "3.png")
    return influences(plan, image[None], LABEL, "mean", progress=False)


@pytest.mark.parametrize(
    ("folder", "how"),
    [
        ("exact_folder", "mean"),
        pytest.param("exact_folder", "lossless", marks=pytest.mark.long),
        ("statistics_folder", "statistics"),
    ],
)
def test_changes_are_those_of_a_run_that_forgets(
    folder: str, how: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch
) -> None:
    monkeypatch.setattr("tangent_ops.shards.run_influence.HELD", 10_000)  # some images at a time
    here: Path = request.getfixturevalue(folder)
    plan = Plan.open(here / "run")
    image = prepared(plan, here / "images" / "class0" / "3.png")
    found = (
        request.getfixturevalue("of_mean")
        if how == "mean"
        else influences(plan, image[None], LABEL, how, progress=False)
    )
    assert len(found.samples) == len(found.changes) == 24
    order = found.changes[:, 0].argsort(descending=True).tolist()
    for index in (order[0], order[-1]):
        sample = found.samples[index].id
        expected = change_if_forgotten(here, tmp_path / str(index), how, image, sample)
        assert float(found.changes[index, 0]) == pytest.approx(expected, rel=0.02)


def test_weights_by_size_overlaps_and_a_shard_of_one_image(
    exact_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(exact_folder / "images", tmp_path / "images")
    shutil.copy(exact_folder / "anchor.safetensors", tmp_path)
    ids = ImageData(str(tmp_path / "images")).open().ids
    shards = {"alone": ids[:1], "most": ids[2:14], "others": ids[12:20]}
    recipe = ShardRecipe(**{**FAST, "method": "exact", "l2": 0.1})
    plan = trained(create_plan(tmp_path, shards, recipe=recipe, allow_overlap=True))
    settle(plan, weights="samples")
    image = prepared(plan, tmp_path / "images" / ids[5])
    found = influences(plan, image[None], LABEL, progress=False)
    places = {sample.id: index for index, sample in enumerate(found.samples)}
    assert found.shards[places[ids[12]]] == ("most", "others")
    with pytest.raises(UnsupportedError, match="share no image, or give --how mean"):
        influences(plan, image[None], LABEL, "lossless", progress=False)
    with pytest.raises(ArgumentError, match=r"targets are \[4\]: its classes are 0 to 3"):
        influences(plan, image[None], torch.tensor([4]), progress=False)
    for sample in (ids[0], ids[12]):
        expected = change_if_forgotten(tmp_path, tmp_path / sample[:6], "mean", image, sample)
        assert float(found.changes[places[sample]]) == pytest.approx(expected, rel=0.02)


def test_the_picture_and_its_numbers(
    exact_folder: Path, tmp_path: Path, of_mean: Influences
) -> None:
    query = tmp_path / "$[red]x.png"
    shutil.copy(exact_folder / "images" / "class0" / "3.png", query)
    out = tmp_path / "grid.png"
    words = ("influence", exact_folder / "run", query, "--out", out, "--top", "3")
    result = run(*words, "--class", f"class{TARGET}", "--json")
    assert result.exit_code == 0, result.output
    record = parsed(result)
    assert (record["class"], record["predicted"]) == ("class2", "class0")
    found = of_mean
    largest, least = found.changes[:, 0].topk(3), (-found.changes[:, 0]).topk(3)
    changes = [row["change"] for row in record["helpful"]]
    assert changes == pytest.approx(largest.values.tolist())
    assert [r["sample"] for r in record["harmful"]] == [found.samples[i].id for i in least.indices]
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300
    assert (
        complaint(run(*words)) == f"--out {out}: it exists: give another name, or --force to "
        "overwrite it\n"
    )
    shown = run(*words, "--force")
    assert "predicted class0, taken as its class (--class gives another)" in shown.stdout
    assert "helped" in shown.stdout and "harmed" in shown.stdout


def test_forgotten_images_are_not_shown(exact_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(exact_folder / "run", tmp_path / "run")
    plan = Plan.open(tmp_path / "run")
    gone = plan.job("shard-1").samples[0].id
    forget(plan, sample=gone, progress=False)
    image = prepared(plan, exact_folder / "images" / "class0" / "3.png")
    shown = [sample.id for sample in influences(plan, image[None], progress=False).samples]
    assert (len(shown), gone in shown) == (23, False)
    plan.manifest.remove({"shard-1": [plan.job("shard-1").samples[0].id]})  # and no more
    with pytest.raises(LedgerError, match="not in line with its plan"):
        influences(plan, image[None], progress=False)


def test_refusals(exact_folder: Path, tmp_path: Path, monkeypatch) -> None:
    image = exact_folder / "images" / "class0" / "3.png"
    out = ("--out", tmp_path / "x.png")
    base = ("influence", exact_folder / "run")
    assert "did you mean class1" in complaint(run(*base, image, *out, "--class", "clas1"))
    assert "is a folder: give the file" in complaint(run(*base, image.parent, *out))
    assert "no folder" in complaint(run(*base, tmp_path / "no.png", *out))
    assert "--top must be an integer" in complaint(run(*base, image, *out, "--top", "0"))
    said = complaint(run(*base, image, *out, "--how", "statistics"))
    assert "--how statistics is not for this run: give mean or lossless" in said
    steps = make_plan(tmp_path)
    refused(run("influence", steps.path, image, *out), "exact only at an optimum: begin a run with")
    cross = make_plan(tmp_path, run="cross", method="exact", l2=0.1, loss="cross-entropy")
    refused(run("influence", cross.path, image, *out), "begin a run with --loss rsl")
    new = make_plan(tmp_path, run="new", method="exact", l2=0.1)
    refused(run("influence", new.path, image, *out), "is not composed yet")
    monkeypatch.setattr("tangent_ops.shards.run_influence.MAX_ROWS", 39)
    said = complaint(run(*base, image, *out))
    assert "shard-1: 10 images of 4 classes are 40 rows of the tangent kernel" in said
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(exact_folder: Path, not_installed) -> None:
    not_installed("matplotlib")
    refused(run("influence", exact_folder / "run", "x.png"), 'pip install "tangent-ops[plots]"')


def test_captions_of_long_names_do_not_touch() -> None:
    from readable_pictures import assert_readable

    name = _short("frame_with_picture_2026-11-29.png")

    def sample(index: int) -> tuple[torch.Tensor, str]:
        return torch.rand(3, 8, 8), f"{name}\n{_short('Travel & Places')}"

    scores = torch.tensor([3.0, 2.0, 1.0, -1.0, -2.0, -3.0])
    assert_readable(influence_grid((torch.rand(3, 8, 8), name), sample, scores, top=3))
