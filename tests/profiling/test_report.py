"""Table, remarks and page, from numbers written by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tangent_ops.profiling.events import Total
from tangent_ops.profiling.families import FAMILIES
from tangent_ops.profiling.profile import Comparison, Side
from tangent_ops.profiling.report import command, print_table, remarks, rows, write_report
from tangent_ops.profiling.sides import Settings

OURS_MS = dict(zip(FAMILIES, (6.0, 20.0, 2.0, 1.0, 1.0, 0.0, 0.0), strict=True))
THEIRS_MS = dict(zip(FAMILIES, (12.0, 25.0, 8.0, 1.0, 2.0, 2.0, 0.0), strict=True))


def comparison(out: Path, *, ours_fail: bool = False) -> Comparison:
    settings = Settings(
        "vit", 4, "fp32", "train", "cpu", ("torch-jvp", "finetune"), out, steps=3, blocks=2
    )
    top = [Total("aten::<mm>", "GEMM", 15.0, 12)]
    ours = Side("tangent-ops", "ours", OURS_MS, [40.0, 42.0, 41.0], 3 * 2**20, None, top)
    theirs = Side("torch-jvp", "theirs", THEIRS_MS, [80.0, 82.0, 400.0], 6 * 2**20, None, top)
    for side in (ours, theirs):
        side.trace = f"{side.name}.json.gz"
    if ours_fail:
        ours = Side("tangent-ops", "ours", error="RuntimeError: no")
    failed = Side("finetune", "ordinary", error="out of memory")
    return Comparison(settings, {"device": "a machine", "threads": "2"}, [ours, theirs, failed])


def test_rows_hold_values_and_ratios(tmp_path: Path) -> None:
    table = {row.name: row.cells for row in rows(comparison(tmp_path))}
    assert list(table) == [*FAMILIES, "sum", "wall time", "peak memory"]
    assert table["attention"] == [("6.000", ""), ("12.0", "0.50"), ("failed", "")]
    assert table["copy"] == [("0.000", ""), ("2.000", "0.00"), ("failed", "")]
    assert table["other"] == [("0.000", ""), ("0.000", ""), ("failed", "")]  # 0 / 0
    assert table["sum"] == [("30.0", ""), ("50.0", "0.60"), ("failed", "")]
    assert table["wall time"] == [("41.0", ""), ("82.0", "0.50"), ("failed", "")]
    assert table["peak memory"] == [("3.0 MiB", ""), ("6.0 MiB", "0.50"), ("failed", "")]


def test_no_ratio_without_ours(tmp_path: Path) -> None:
    table = {row.name: row.cells for row in rows(comparison(tmp_path, ours_fail=True))}
    assert table["sum"] == [("failed", ""), ("50.0", ""), ("failed", "")]


def test_remarks_name_what_failed_and_what_varies(tmp_path: Path) -> None:
    varies, failed = remarks(comparison(tmp_path))
    assert varies.startswith("torch-jvp: steps took 80.0 to 400.0 ms")
    assert failed == "finetune failed: out of memory"


def test_the_terminal_shows_all_of_it(tmp_path: Path) -> None:
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as captured:
        print_table(comparison(tmp_path), console)
    text = captured.get()
    for words in ("attention", "0.60", "finetune failed: out of memory", "a machine", "--blocks 2"):
        assert words in text


def test_the_command_can_be_run_again(tmp_path: Path) -> None:
    assert command(comparison(Path("a folder")).settings) == (
        "tangent-ops profile --model vit --batch 4 --dtype fp32 --against torch-jvp "
        "--against finetune --mode train --device cpu --blocks 2 --steps 3 --warmup 2 "
        "--out 'a folder'"
    )


class Page(HTMLParser):
    """Collects elements and text; complains about elements that are not closed in order."""

    EMPTY = ("meta", "rect", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY or tag == "rect":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    paths = write_report(comparison(tmp_path))
    assert [path.name for path in paths] == [
        "profile.json", "report.html", "tangent-ops.json.gz", "torch-jvp.json.gz",
    ]  # fmt: skip
    return Page(paths[1].read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert not page.all("script") + page.all("img") + page.all("link")
    links = {attributes["href"] for attributes in page.all("a")}
    assert links == {"tangent-ops.json.gz", "torch-jvp.json.gz", "https://ui.perfetto.dev"}


def test_bars_are_as_long_as_the_times(page: Page) -> None:
    widths = [float(attributes["width"]) for attributes in page.all("rect")]
    assert len(widths) == 2 * len(FAMILIES)  # none for the side that failed
    ours, theirs = widths[: len(FAMILIES)], widths[len(FAMILIES) :]
    assert ours == pytest.approx([100 * ms / 50 for ms in OURS_MS.values()])
    assert theirs == pytest.approx([100 * ms / 50 for ms in THEIRS_MS.values()])
    starts = [float(attributes["x"]) for attributes in page.all("rect")][: len(FAMILIES)]
    assert starts == pytest.approx([sum(ours[:k]) for k in range(len(FAMILIES))])


def test_the_page_shows_table_kernels_and_conditions(page: Page) -> None:
    for words in ("aten::<mm>", "50.0 %", "finetune failed: out of memory", "a machine", "0.60"):
        assert words in page.text  # 15 of 30 ms


def test_all_sides_may_have_failed(tmp_path: Path) -> None:
    everything = comparison(tmp_path)
    for side in everything.sides:
        side.error, side.families, side.trace = "out of memory", {}, ""
    assert len(write_report(everything)) == 2


def test_the_json_holds_every_number(tmp_path: Path) -> None:
    write_report(comparison(tmp_path))
    found = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert found["schema"] == 1
    assert found["settings"]["batch"] == 4 and found["environment"]["threads"] == "2"
    ours, theirs, failed = found["sides"]
    assert ours["families"] == OURS_MS and theirs["wall"] == [80.0, 82.0, 400.0]
    assert ours["peak"] == 3 * 2**20 and failed["error"] == "out of memory"
