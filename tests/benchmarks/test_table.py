"""The table says what a result says."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace

import pytest
from made_up import CEILINGS, attention_rows, model_rows, result, row, timing, write
from rich.console import Console

from benchmarks import table, units
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row
from benchmarks.table import print_table

CASE = Case("attention-forward", "attention", (8, 12, 197, 64), "fp32")
ROWS = [
    row(CASE, "ours", 0.02, flops=1e9, bytes=4e7, peak_bytes=5_000_000, saved_bytes=1_200),
    row(CASE, "torch-jvp", None, note="no [tangent] for it"),
    row(CASE, "sdpa-flash", 0.01, flops=4e8, bytes=2e7, error=None),
    row(CASE, "sdpa-math", 0.05, flops=4e8, bytes=2e7),
    Row(CASE, "compiled", "absent", "on the CPU only if asked"),
    Row(CASE, "finite-differences", "wrong", "error 1.0e-01, allowed 1.0e-03", error=0.1),
]


def printed(content: Result) -> str:
    stream = io.StringIO()
    print_table(Console(file=stream, width=120), content)
    return stream.getvalue()


def cells(text: str, provider: str) -> list[str]:
    """Of the provider's line, split at two spaces or more."""
    (line,) = (one for one in text.splitlines() if one.strip().startswith(provider + " "))
    return re.split(r"\s{2,}", line.strip())


def test_figures() -> None:
    text = printed(result(ROWS))
    headings = re.split(r"\s{2,}", text.splitlines()[2].strip())
    ours = dict(zip(headings, cells(text, "ours")[1:], strict=True))
    assert ours == {
        "median": "20.0 ms",
        "quartiles": "19.6 to 21.0",
        "TFLOP/s": "0.050",
        "GB/s": "2.00",
        "% floor": "50 %",
        "/ ours": "1.00",
        "/ sdpa-flash": "2.00",
        "error": "3e-07",
        "peak": "5.00 MB",
        "saved": "1.20 kB",
    }
    assert cells(text, "sdpa-math")[6:8] == ["2.50", "5.00"]


def test_notes_instead_of_numbers() -> None:
    text = printed(result(ROWS))
    assert " torch-jvp: failed: no [tangent] for it\n" in text
    assert " compiled: absent: on the CPU only if asked\n" in text
    assert " finite-differences: wrong: error 1.0e-01, allowed 1.0e-03\n" in text


def test_groups_conditions_and_width() -> None:
    text = printed(result(attention_rows([(8, 12, 50, 64), (8, 12, 197, 64)]) + model_rows()))
    lines = text.splitlines()
    groups = [line.split()[0] for line in lines if "───" in line]
    assert groups == [
        "attention-forward",
        "attention-backward",
        "attention-second-order",
        "model-forward",
        "train-step",
    ]
    assert max(map(len, lines)) <= 120
    assert "An Example CPU, 2 cores, 2 threads, torch 2.14.0, commit 0123456789ab" in lines[-1]
    assert "bytes/s 10.0e9, flops/s fp32 100e9" in lines[-2]
    assert "/ taft-all" in text and "/ finetune" in text


def test_empty_columns_are_left_out() -> None:
    plain = row(CASE, "ours", 0.02, error=None)
    text = printed(Result({}, {}, [plain]))
    assert text.splitlines()[2].split() == ["median", "quartiles", "/", "ours"]
    assert "called" not in text


def test_a_graph_stands_for_the_device() -> None:
    graphed = replace(ROWS[0], graph=timing(0.01))
    text = printed(Result({}, CEILINGS, [graphed, ROWS[2]]))
    assert cells(text, "ours")[1:4] == ["10.0 ms", "9.80 to 10.5", "20.0 ms"]


def test_nothing_timed() -> None:
    text = printed(result([ROWS[1]]))
    assert "torch-jvp: failed" in text and "median" not in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (2e-7, "0.200 µs"), (150, "150 s")]
)
def test_durations(seconds, words) -> None:
    assert units.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1e6, "1.00 MB"), (12.34e9, "12.3 GB")]
)
def test_amounts(count, words) -> None:
    assert units.amount(count) == words


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    path = write(tmp_path / "suite.json", result(ROWS))
    monkeypatch.setattr(sys, "argv", ["table", str(path)])
    assert table.main() == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"{path}\n") and "attention 8x12x197x64 fp32" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: No such file or directory"),
        ("{", "{path} is not JSON: "),
        ("{}", "{path} is not a result of the suite (KeyError: 'environment'): "),
        ("[1]", "{path} is not a result of the suite (AttributeError: "),
        (json.dumps(result([]).to_json()), "{path} has no rows: nothing was measured"),
    ],
)
def test_unusable_files(tmp_path, monkeypatch, capsys, content, message) -> None:
    path = tmp_path / "suite.json"
    if content is not None:
        path.write_text(content)
    good = write(tmp_path / "good.json", result(ROWS))
    monkeypatch.setattr(sys, "argv", ["table", str(good), str(path)])
    assert table.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message.format(path=path)) and err.count("\n") == 1
