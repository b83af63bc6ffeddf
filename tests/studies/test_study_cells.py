"""Cells are planned in waves, stored one by one, and run again only if sources change."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from studies.paper import cells
from studies.paper.cells import Cell, Found, run_all
from tests.studies import made_up_cells


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("MARKS", str(folder))
    return folder


def _run(folder: Path) -> Found:
    return run_all(made_up_cells.plan, made_up_cells.run, folder, workers=1, threads=1)


def _ran(marks: Path) -> Counter[int]:
    files = marks.glob("ran-*")
    return Counter({int(file.name.split("-")[1]): len(file.read_text()) for file in files})


def test_waves_failures_and_going_on(marks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    (marks / "fail-2").touch()
    with pytest.raises(
        RuntimeError, match=r"cells that failed: 1(.|\n)*ValueError: 2 is out of luck"
    ):
        _run(folder)
    assert _ran(marks) == {1: 1, 3: 1}
    (marks / "fail-2").unlink()
    found = _run(folder)
    assert _ran(marks) == {1: 1, 2: 1, 3: 1, 9: 1}  # the others were kept
    squares = {cell["number"]: cell["squared"] for cell in found.of("square")}
    assert squares == {1: 1, 2: 4, 3: 9, 9: 81}
    assert cells.kept(folder) == 4
    _run(folder)
    assert _ran(marks) == {1: 1, 2: 1, 3: 1, 9: 1}


def test_other_sources_and_cut_off_files(
    marks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cells"
    _run(folder)
    (folder / "square-1-cut.part").write_text('{"part": "squ')  # of a run that was killed
    monkeypatch.setattr(cells, "sources_sha256", lambda: "others")
    _run(folder)
    assert _ran(marks) == {1: 2, 2: 2, 3: 2, 9: 2}
    kept = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert {record["sources"] for record in kept} == {"others"}


def test_sources_are_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.py", "b/report/y.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "SOURCES", ("a", "b"))
    monkeypatch.setattr(cells, "WRITTEN_BY", tmp_path / "b" / "report")
    before = cells.sources_sha256()
    (tmp_path / "b" / "report" / "y.py").write_text("2")
    assert cells.sources_sha256() == before
    (tmp_path / "a" / "x.py").write_text("2")
    assert cells.sources_sha256() != before


def test_names_tell_cells_apart_and_are_file_names() -> None:
    one = Cell("a", {"deal": "by class", "rate": 1e-4, "removed": [1, 2]})
    other = Cell("a", {"deal": "by class", "rate": 1e-4, "removed": [1, 3]})
    assert one.name != other.name
    assert one.name.startswith("a-by_class-0.0001-1+2-")
    long = Cell("a", {"text": "x/" * 400})
    assert "/" not in long.name and len(long.name) < 200


def test_found_asks_by_part_and_arguments() -> None:
    record = {"part": "a", "arguments": {"seed": 1}, "result": {"right": 0.5}, "seconds": 2.0}
    found = Found({"x": record, "y": {**record, "part": "b"}})
    assert found.of("a", seed=1) == [{"seed": 1, "right": 0.5, "cell_seconds": 2.0}]
    assert found.of("a", seed=2) == []
