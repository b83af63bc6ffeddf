"""Cells are stored one by one, and run again only if what computes them changes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from studies.paper import cells, planned
from studies.paper.cells import Cell, Found, run_all
from tests.studies.made_up_cells import CELLS, run


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("MARKS", str(folder))
    return folder


def _run(folder: Path, sources: str = "these") -> Found:
    return run_all(CELLS, run, folder, sources=lambda _: sources, workers=1, threads=1)


def _ran(marks: Path) -> Counter[int]:
    files = marks.glob("ran-*")
    return Counter({int(file.name.split("-")[1]): len(file.read_text()) for file in files})


def test_failures_and_going_on(marks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    (marks / "fail-2").touch()
    with pytest.raises(
        RuntimeError, match=r"cells that failed: 1(.|\n)*ValueError: 2 is out of luck"
    ):
        _run(folder)
    assert _ran(marks) == {1: 1, 3: 1}
    (marks / "fail-2").unlink()
    found = _run(folder)
    assert _ran(marks) == {1: 1, 2: 1, 3: 1}  # the others were kept
    squares = {cell["number"]: cell["squared"] for cell in found.of("square")}
    assert squares == {1: 1, 2: 4, 3: 9}
    _run(folder)
    assert _ran(marks) == {1: 1, 2: 1, 3: 1}


def test_other_sources_and_cut_off_files(marks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cells"
    _run(folder)
    (folder / "square-1-cut.part").write_text('{"part": "squ')  # of a run that was killed
    _run(folder, "others")
    assert _ran(marks) == {1: 2, 2: 2, 3: 2}
    kept = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert {record["sources"] for record in kept} == {"others"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library, and a study whose part imports one module, which imports another."""
    texts = {
        "library/x.py": "",
        "studies/paper/parts/part.py": "from studies.paper.shared import Thing",
        "studies/paper/shared.py": "from studies.paper.parts import deeper",
        "studies/paper/parts/deeper.py": "import studies.paper.deepest",
        "studies/paper/deepest.py": "",
        "studies/paper/parts/other.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "SOURCES", ("library",))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("library/x.py", True),
        ("studies/paper/parts/part.py", True),
        ("studies/paper/shared.py", True),
        ("studies/paper/parts/deeper.py", True),
        ("studies/paper/deepest.py", True),
        ("studies/paper/parts/other.py", False),
    ],
)
def test_sources_are_what_a_part_imports(tree: Path, changed: str, again: bool) -> None:
    of = cells.sources_sha256.__wrapped__  # without what it remembers
    before = of("studies.paper.parts.part")
    with (tree / changed).open("a") as file:
        file.write("\n# changed")
    assert (of("studies.paper.parts.part") != before) == again


def test_no_part_is_computed_by_what_writes_pages_or_asks_for_cells() -> None:
    for part in planned.RUNS:
        names = {path.name for path in cells.modules_of(planned.module_of(part))}
        assert {"tokens.py", "tuning.py", "outcomes.py"} <= names
        assert not names & {"presets.py", "planned.py", "pages.py", "claims.py"}


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
