"""The README's line on the study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.stored import BadFile
from benchmarks.study_table import read_study, study_table


def test_counts_by_verdict(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    claims = [{"verdict": "a"}, {"verdict": "b"}, {"verdict": "a"}]
    verdicts = {"a": "hold", "b": "do not", "c": "are open"}
    path.write_text(json.dumps({"claims": claims, "verdicts": verdicts, "ran": "Here, today"}))
    lines = study_table(read_study(path)).splitlines()
    assert lines[0] == "Of 3 claims 2 hold, 1 do not and 0 are open."
    assert lines[-1] == "Here, today; `make study`."


def test_nothing_or_something_else(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    assert study_table(read_study(path)) == "Not measured yet."
    for text in ("", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(BadFile, match=r"claims\.json"):
            read_study(path)
