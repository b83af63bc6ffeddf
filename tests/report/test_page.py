"""What a run's page says and shows, what it leaves out, and that names cannot break it."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_runs import make_run
from shard_runs import anchor_file, create_plan, image_folder, make_plan, trained

from tangent_ops.errors import ArgumentError
from tangent_ops.report import collect, page_of, write_page
from tangent_ops.shards import ImageData, Plan, forget, load_anchor, save_anchor, settle

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags with attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(plan: Plan, data: ImageData | None = None) -> Page:
    return Page(page_of(collect(plan, data, progress=False)))


def images_in(found: Page) -> list[Image.Image]:
    sources = [one["src"] or "" for one in found.all("img")]
    assert all(source.startswith("data:image/") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def test_a_page_of_exact_fits(exact: Plan) -> None:
    found = page(exact)
    words = " ".join(found.text.split())
    parts = ("24 of 4 classes", "3 trained, 3 composed", "without it", "end of the fit")
    for said in (*parts, "they helped", "they harmed", "Nothing is promised"):
        assert said in words, said
    assert len(images_in(found)) > 3 * 4 + 4
    titles = Counter(one["title"] for one in found.all("img") if one.get("title"))
    assert all(f"class{k}" in " ".join(map(str, titles)) for k in range(4))
    counts = [cell for cell in found.all("td") if (cell.get("title") or "").startswith("shard-")]
    assert sum(int(str(cell["title"]).rpartition(" ")[2]) for cell in counts) == 24


def test_a_page_of_statistics(summed: Plan) -> None:
    words = page(summed).text
    for said in ("head only", "summed in one pass", "the same bits as if"):
        assert said in words, said


def test_a_page_of_steps_has_losses(stepped: Plan) -> None:
    found = page(stepped)
    curves = [one["d"] or "" for one in found.all("path")]
    assert len(curves) == 6  # a loss and an accuracy of each shard
    assert all(curve.count(" L") == 1 for curve in curves)  # two epochs
    assert "trained by steps (method 'gradient'), and influence is exact only" in found.text
    assert "trained again without it" in found.text


def test_nothing_is_loaded(exact: Plan) -> None:
    text = page_of(collect(exact, progress=False))
    found = Page(text)
    assert not found.all("script") + found.all("link") + found.all("iframe") + found.all("a")
    policy = [one["content"] for one in found.all("meta") if one.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "http://" not in text and "https://" not in text and "url(" not in text


def test_what_is_forgotten_is_gone(folder: Path) -> None:
    plan = make_run(folder, "exact", run="forgetful", validation=None)
    samples = plan.job("shard-1").samples
    before = images_in(page(plan))
    gone = samples[0].id
    forget(plan, sample=gone, progress=False)
    text = page_of(collect(Plan.open(plan.path), progress=False))
    assert gone not in text
    found = Page(text)
    lost = Image.open(Path(plan.data.root) / gone).convert("RGB").tobytes()
    assert lost in [image.tobytes() for image in before]
    assert lost not in [image.tobytes() for image in images_in(found)]
    words = " ".join(found.text.split())
    assert "1 image forgotten shard-1" in words
    assert "certificate after forgetting" in words
    assert "No labelled images are known" in words
    forget(plan, shard="shard-1", progress=False)
    words = " ".join(page(Plan.open(plan.path)).text.split())
    assert f"{len(samples) - 1} images forgotten shard-1" in words


def test_a_run_that_is_not_composed(folder: Path, tmp_path: Path, exact: Plan) -> None:
    shutil.copytree(exact.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ledger")
    found = page(Plan.open(tmp_path / "run"))
    assert "is not composed yet" in found.text
    assert "needs labelled images, and a composed run" in found.text


def test_a_private_run_shows_no_training_image(tmp_path: Path, exact: Plan) -> None:
    found = page(make_plan(tmp_path, dp_epsilon=3.0, dp_delta=1e-5))
    assert found.all("img") == []
    assert "The fits are private, so this page shows no training image." in found.text
    assert page(exact).all("img")


def test_images_that_cannot_be_read_are_left_out(exact: Plan, tmp_path: Path) -> None:
    shutil.copytree(exact.path, tmp_path / "run")
    plan = Plan.open(tmp_path / "run")
    shutil.copytree(plan.data.root, tmp_path / "images")
    plan.relocate(ImageData(str(tmp_path / "images")), progress=False)
    (tmp_path / "images" / plan.job("shard-0").samples[0].id).write_bytes(b"other")
    found = page(plan)
    assert "1 of" in found.text and "cannot be read" in found.text
    assert "is not what it was" in found.text  # influences need all images
    with pytest.raises(ArgumentError, match="no folder"):
        collect(plan, ImageData(str(tmp_path / "nowhere")))


HOSTILE = "\"><script>alert(1)<\\script><img src=x onerror=alert(1)>'&amp;{{7*7}}"


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", classes=2, each=2)
    os.rename(tmp_path / "images" / "class0", tmp_path / "images" / HOSTILE)
    os.rename(
        tmp_path / "images" / "class1" / "0.png", tmp_path / "images" / "class1" / f"{HOSTILE}.png"
    )
    anchor_file(tmp_path / "plain.safetensors", classes=2)
    model, info = load_anchor(tmp_path / "plain.safetensors")
    save_anchor(
        model,
        tmp_path / "anchor.safetensors",
        name=info.name,
        options=info.options,
        classes=[HOSTILE, "class1"],
        origin=HOSTILE,
    )
    data = ImageData(str(tmp_path / "images"))
    ids = data.open().ids
    plan = create_plan(tmp_path, {HOSTILE: ids[:2], "b": ids[2:]}, validation=None)
    settle(trained(plan))
    shutil.copytree(tmp_path / "images", tmp_path / "test")
    broken = os.fsencode(tmp_path / "test" / "class1" / "1.png")
    os.rename(broken, broken.replace(b"1.png", b"\xff.png"))  # a name that is no text
    report = collect(plan, ImageData(str(tmp_path / "test")), progress=False)
    found = Page(page_of(report))
    assert not found.all("script")
    assert found.text.count(HOSTILE) >= 4
    assert not any(name.startswith("on") for _, given in found.tags for name in given)
    assert write_page(report, tmp_path / "page.html") == (tmp_path / "page.html").stat().st_size
