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
from studies.paper.parts import composition as composition_part
from studies.paper.report import composition, forgetting, influence, privacy
from studies.paper.report.pages import CLAIMS, FIRST, PAGE, write_pages
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
    claims = [entry["claim"] for entry in json.loads((DOCS / CLAIMS).read_text())["claims"]]
    assert all(any(claim.endswith(end) for claim in claims) for end in FIRST)
    shown = re.findall(r"!\[[^]]+\]\((\S+)\)", page)
    assert shown and len(set(shown)) == len(shown)
    for picture in shown:
        for folder in (tmp_path, DOCS):
            grey = np.asarray(Image.open(folder / picture).convert("L"))
            assert grey.std() > 10, f"{picture} is blank"


def test_the_preset_ran_to_its_end() -> None:
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    assert results["preset"] == "cpu"
    assert results["total_seconds"] < 3600
    assert not results["commit"].endswith("-dirty")
    assert {cell["arguments"].get("seed") for cell in results["cells"].values()} >= set(range(5))


def test_a_deal_that_was_not_run_is_not_made_up_from_the_other() -> None:
    def cell(seed: int, shards: int) -> dict:
        arguments = {"images": "x", "way": "exact", "deal": "iid", "shards": shards}
        result = {"lossless": 0.5 + seed / 10, "lossless_validation": 0.5}
        given = {**arguments, "seed": seed, "rate": composition_part.RATES["exact"][0]}
        return {"part": composition_part.PART, "arguments": given, "result": result, "seconds": 1}

    cells = [cell(seed, shards) for seed in (1, 0) for shards in (1, 5)]
    found = Found({str(number): entry for number, entry in enumerate(cells)})
    asked = (found, "x", "by class", "exact")
    assert composition.values(*asked, 5, "lossless") == []
    assert composition.values(*asked, 1, "lossless") == [0.5, 0.6]  # one shard is one shard
    assert composition.values(found, "x", "iid", "exact", 5, "lossless") == [0.5, 0.6]
    assert composition.numbers(found, "x", "exact", "by class") == [1]


@pytest.mark.parametrize(
    "looks",
    [
        [*composition.LOOKS.values(), *composition.EXACT.values()],
        [*forgetting.LOOKS.values()],
        [*privacy.LOOKS.values()],
        [*influence.LOOKS.values()],
    ],
)
def test_series_differ_by_marker(looks: list) -> None:
    assert len({look.marker for look in looks}) == len(looks)
