"""Pictures: what they have in common, and that each one can be read, from made-up data."""

from __future__ import annotations

import builtins
import json
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra for plots is not installed")

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from readable_pictures import assert_readable

from tangent_ops import pictures
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.influence_grid import influence_grid


@pictures.styled()
def two_lines() -> Figure:
    """With ends near each other, and with everything else that a picture has."""
    figure = pictures.new_figure()
    axes = figure.subplots()
    axes.plot([1, 10, 1000], [1.0, 2.0, 3.0], **pictures.Look("a", "o", "-", "#000000").drawn)
    axes.plot([1, 10, 1000], [1.2, 2.1, 3.01], color=pictures.BLUE)
    pictures.number_axis(axes, [1, 10, 1000])
    pictures.draw_level(axes, 2.99, "level")
    pictures.note(figure, "Small print. " * 20)
    pictures.legend_above(figure, columns=2, title="A title")
    ends = [(3.0, "one", "#000000"), (3.01, "other", pictures.SKY), (2.99, "level", "#555555")]
    pictures.label_ends(axes, ends)
    return figure


def test_labels_and_ticks_do_not_touch() -> None:
    figure = two_lines()
    assert_readable(figure)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10", "1,000"]
    assert [text.get_text() for text in axes.texts] == ["level", "one", "other"]
    heights = [text.get_window_extent().y0 for text in axes.texts]
    assert all(b > a + 10 for a, b in pairwise(heights))  # pixels


@pytest.mark.parametrize("places", [[1.0, 1.1, 5.0], [0.0, 0.9, 1.0, 1.1, 2.4], [3.0]], ids=str)
def test_labels_are_moved_apart_and_stay_near(places) -> None:
    moved = pictures.spread(places, gap=1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places))
    assert pictures.spread([0.0, 1.0, 2.5], gap=1.0) == [0.0, 1.0, 2.5]


def test_numbers_without_room_get_no_text() -> None:
    (axes,) = two_lines().axes
    pictures.number_axis(axes, [100, 101, 102, 10_000])
    texts = [tick.get_text() for tick in axes.get_xticklabels()]
    assert texts == ["100", "", "", "10,000"]


def test_a_figure_is_saved_whole_and_the_same_each_time(tmp_path, monkeypatch) -> None:
    path = pictures.save(two_lines(), tmp_path / "a.png")
    first = path.read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "savefig.facecolor", "red")  # a user's own
    figure = two_lines()
    assert pictures.save(figure, str(path)).read_bytes() == first
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pictures.save(figure, path)
    assert path.read_bytes() == first and [*tmp_path.iterdir()] == [path]


def test_a_style_leaves_the_users_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    with pictures.styled():
        assert matplotlib.rcParams["legend.frameon"] is False
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch) -> None:
    plain = builtins.__import__

    def missing(name, *rest, **more):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'tangent-ops\[plots\]'"):
        influence_grid(
            (torch.zeros(1, 2, 2), ""), lambda i: (torch.zeros(1, 2, 2), ""), torch.ones(1)
        )


def contrast(colour: str) -> float:
    """With white, by WCAG 2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05)


def test_words_can_be_read_in_every_colour() -> None:
    colours = [value for value in vars(pictures).values() if str(value).startswith("#")]
    assert len(set(colours)) == 8
    assert all(contrast(pictures.INKS.get(colour, colour)) >= 4.5 for colour in colours)


def overlapping(axes) -> None:
    axes.text(0.5, 0.5, "one")
    axes.text(0.5, 0.5, "other")


def clipped(axes) -> None:
    axes.text(0.99, 0.5, "a text that is longer than what is left", in_layout=False)


def crowded(axes) -> None:
    axes.set_xticks([0.5, 0.501], ["first", "second"])


def boxed(axes) -> None:
    axes.plot([0, 1], [0, 1], label="a")
    axes.legend(frameon=True)


def on_the_axis(axes) -> None:
    axes.axhline(0.001)
    axes.set_ylim(0, 1)


def struck(axes) -> None:
    axes.text(0.5, 0.5, "1.67")
    axes.axvline(0.51)


def unlike(axes) -> None:
    other = axes.get_figure().add_subplot(1, 2, 2)
    other.set(ylim=(0, 5), ylabel="accuracy")
    axes.set(subplotspec=other.get_subplotspec().get_gridspec()[0], ylabel="accuracy")


DEFECTS = {
    overlapping: "texts overlap",
    clipped: "cut off",
    crowded: "texts overlap",
    boxed: "with a box",
    on_the_axis: "on an axis",
    struck: "goes through",
    unlike: "differ in scale",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_what_broke_once_is_seen(defect) -> None:
    with pictures.styled():
        figure = pictures.new_figure(4, 3)
        axes = figure.add_subplot()
        assert_readable(figure)
        defect(axes)
        with pytest.raises(AssertionError, match=DEFECTS[defect]):
            assert_readable(figure)


@pytest.mark.parametrize(("found", "more"), [(2, ""), (6, ""), (6, "\na/long/name.png")])
def test_the_influence_grid(found: int, more: str) -> None:
    scores = torch.linspace(-1, 1, 2 * found) * 3.14159e-3

    def sample(index: int):
        return torch.full((3, 8, 8), float(index)), f"class {index}{more}"

    assert_readable(influence_grid((torch.rand(3, 8, 8), "tabby, taken for tiger"), sample, scores))


DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def saved(monkeypatch) -> list[Path]:
    """Every picture that is saved is checked; their paths."""
    paths, save = [], pictures.save

    def checked(figure, path):
        assert_readable(figure)
        paths.append(path)
        return save(figure, path)

    monkeypatch.setattr(pictures, "save", checked)
    return paths


@pytest.mark.parametrize(
    ("mean", "summed", "seconds"),
    [((92.6, 90.9, 83.8), 90.4, 0.089), ((60.0, 99.0, 99.9), 99.5, 12.0)],
)
def test_the_demo(mean, summed, seconds) -> None:
    pytest.importorskip("rich", reason="the demo's extra is not installed")
    import studies  # noqa: F401, I001  # makes the demo's modules importable
    from picture import Results, draw

    results = Results("a model", "a setting", "test")
    for kind, score in {"anchor": 77.5, "head": 89.9, "ordinary": 93.3}.items():
        results.add(kind, kind, 100, score / 100, seconds=2.2)
    for number, score in zip((1, 5, 50), mean, strict=True):
        results.add("mean", f"{number}", 100, score / 100, 1.0, shards=number)
        results.add("statistics", f"{number}", 100, summed / 100, 1.0, shards=number)
    for kind in ("no image", "no shard"):
        results.add(kind, kind, 100, 0.868, seconds, 0.3)
    assert_readable(draw(results))


def test_the_readme_states_what_its_picture_shows() -> None:
    """Of docs/demo.json; the README leaves out the head of public images."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    rows = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["kind"] != "anchor":
            assert f"{100 * row['accuracy']:.1f} %" in readme, row
        if row["kind"] in ("ordinary", "no image", "no shard"):  # the picture's times
            seconds = row["seconds"]
            assert f"{seconds:.2f} s" in readme or f"{seconds:.1f} s" in readme, row


def test_pictures_of_pages(saved, tmp_path) -> None:
    pytest.importorskip("opacus", reason="the study's extra is not installed")
    from tools.pages import pictures as page_pictures

    for draw in (page_pictures.draw_demo, page_pictures.draw_privacy, page_pictures.draw_shards):
        path = draw(tmp_path)
        now, kept = (imread(one / path.name) for one in (tmp_path, page_pictures.DOCS))
        assert now.shape == kept.shape and now.std() > 0.05, path.name
    assert saved == [tmp_path / name for name in ("demo.png", "privacy.png", "shards-scale.png")]
    with pytest.raises(ValueError, match="no table begins with"):
        page_pictures.table("| other |\n", "| none")
