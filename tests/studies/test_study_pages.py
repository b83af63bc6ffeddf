"""docs/study follows from its results.json, and its plots are readable without colours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from readable_pictures import assert_readable

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.cells import Found
from studies.paper.report import composition, forgetting, influence, privacy
from studies.paper.report.edges import edges
from studies.paper.report.pages import PAGE, write_pages
from tangent_ops import pictures

DOCS = Path(__file__).parents[2] / "docs" / "study"


def test_the_page_is_what_its_results_make(tmp_path: Path, monkeypatch) -> None:
    save = pictures.save
    monkeypatch.setattr(
        pictures, "save", lambda figure, path: assert_readable(figure) or save(figure, path)
    )
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    written = write_pages(results, tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page == (DOCS / PAGE).read_text(encoding="utf-8")
    assert {path.name for path in written} | {"results.json"} == {
        path.name for path in DOCS.iterdir()
    }
    shown = re.findall(r"!\[[^]]+\]\((\S+)\)", page)
    assert shown and len(set(shown)) == len(shown)
    for picture in shown:
        for folder in (tmp_path, DOCS):
            grey = np.asarray(Image.open(folder / picture).convert("L"))
            assert grey.std() > 10, f"{picture} is blank"


def test_the_preset_ran_to_its_end() -> None:
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    assert results["preset"] == "cpu"
    # Of two processes on two cores; a run that went on has fewer seconds than its cells.
    computing = sum(cell["seconds"] for cell in results["cells"].values())
    assert max(results["total_seconds"], computing / results["machine"]["workers"]) < 3600
    assert not results["commit"].endswith("-dirty")
    assert {cell["arguments"].get("seed") for cell in results["cells"].values()} >= set(range(5))


def test_edges_are_counted_and_listed() -> None:
    told = {"chosen": 4.0, "tried": [[2.0, 0.1], [4.0, 0.2]]}
    inside = {**told, "tried": [*told["tried"], [8.0, 0.1]]}
    alone = {**told, "tried": [[4.0, 0.2]]}  # nothing was chosen

    def cell(seed: int, choice: dict) -> dict:
        arguments = {"images": "x", "seed": seed}
        return {"part": "a", "arguments": arguments, "result": {"choices": {"rate": choice}}}

    cells = [cell(0, told), cell(1, inside), cell(2, told), cell(3, alone)]
    found = Found({str(number): one for number, one in enumerate(cells)})
    assert "Of 3 choices of an option, 2 ended at an end" in edges(found)
    assert "| a | x | rate | 2 | 4 |" in edges(found)
    none = edges(Found({"1": cell(1, inside)}))
    assert "Of 1 choices of an option, 0 ended at an end" in none and "|" not in none


@pytest.mark.parametrize(
    "looks",
    [
        [*composition.LOOKS.values()],
        [*forgetting.LOOKS.values()],
        [*privacy.LOOKS.values()],
        [*influence.LOOKS.values()],
    ],
)
def test_series_differ_by_marker(looks: list) -> None:
    assert len({look.marker for look in looks}) == len(looks)
