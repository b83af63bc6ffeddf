"""Rows, table, verdicts, pictures and pages of a stored result."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from made_up import attention_rows, model_rows, result, row, write

from benchmarks import report
from benchmarks.case import Case
from benchmarks.stored import BadFile, Row, newest, read
from tangent_ops import pictures

CASE = Case("attention-forward", "attention", (8, 12, 197, 64), "fp32")
ROWS = [
    row(CASE, "ours", 0.02, flops=1e9, bytes=4e7, peak_bytes=5_000_000, saved_bytes=1_200),
    row(CASE, "sdpa-flash", 0.01, flops=4e8, bytes=2e7, error=None),
    row(CASE, "sdpa-math", 0.05, flops=4e8, bytes=2e7),
    row(CASE, "torch-jvp", None, note="no tangent for it"),
    Row(CASE, "compiled", "absent", "on the CPU only if asked"),
]


def cells(text: str, name: str) -> list[str]:
    """Of the line that begins with the name, split at two spaces or more."""
    (line,) = (one for one in text.splitlines() if one.strip().startswith(name + " "))
    return re.split(r"\s{2,}", line.strip())


def test_a_result_survives_its_file(tmp_path) -> None:
    content = result([*ROWS, *model_rows()])
    found = read([write(tmp_path / "a.json", content)])
    assert sorted(found.rows, key=str) == sorted(content.rows, key=str)
    assert (found.environment, found.ceilings) == (content.environment, content.ceilings)


def test_turns_are_one_row_with_the_median_of_their_medians(tmp_path) -> None:
    found = read([write(tmp_path / "a.json", result(ROWS), turns=3)])
    assert [one.seconds for one in found.rows[:3]] == pytest.approx([0.022, 0.011, 0.055])


def test_files_of_a_folder_are_one_result(tmp_path) -> None:
    write(tmp_path / "attention.json", result(ROWS))
    write(tmp_path / "models.json", result(model_rows()))
    assert len(read([tmp_path]).rows) == len(ROWS) + len(model_rows())


def test_the_newest_of_each_device(tmp_path) -> None:
    old, new = result(ROWS), result(ROWS)
    old = replace(old, environment={**old.environment, "date": "2026-01-01 00:00 UTC"})
    write(tmp_path / "2026-z.json", old)
    write(tmp_path / "2026-a.json", new)
    (tmp_path / "2026-gpu").mkdir()
    write(tmp_path / "2026-gpu" / "attention.json", result(ROWS, gpu=True))
    found = newest(tmp_path)
    assert list(found) == ["cpu", "nvidia-example-gpu"]
    assert found["cpu"].environment["date"] == new.environment["date"]


def test_the_table() -> None:
    text = report.table(result(ROWS))
    ours = dict(zip(cells(text, str(CASE))[1:], cells(text, "ours")[1:], strict=True))
    assert ours == {
        "median": "20.0 ms",
        "quartiles": "19.6 ms to 21.0 ms",
        "TFLOP/s": "0.0500",
        "GB/s": "2.00",
        "% floor": "50 %",
        "/ ours": "1.00",
        "/ sdpa-flash": "2.00",
        "error": "3e-07",
        "peak": "5.00 MB",
        "saved": "1.20 kB",
    }
    assert cells(text, "sdpa-math")[6:8] == ["2.50", "5.00"]
    assert "  torch-jvp: failed: no tangent for it\n" in text
    assert "  compiled: absent: on the CPU only if asked\n" in text
    assert text.splitlines()[-2:] == [
        "limits of this machine: bytes/s 10.0e9, flops/s fp32 100e9, flops/s bf16 1000e9",
        "An Example CPU, 2 cores, 2 threads, torch 2.14.0, commit 0123456789ab, "
        "2026-11-24 12:00 UTC",
    ]


def test_a_graph_stands_for_the_device() -> None:
    text = report.table(result([replace(ROWS[0], called=0.03), ROWS[1]]))
    assert cells(text, "ours")[1:4] == ["20.0 ms", "19.6 ms to 21.0 ms", "30.0 ms"]


@pytest.mark.parametrize(
    ("rows", "red"),
    [
        (model_rows(2.9, 1.6, 1.0), []),
        (model_rows(2.9, 1.75, 1.0), ["not met: tangent step / fine-tuning step, ViT-S"]),
        ([Row(CASE, "ours", "wrong", "error 1")], ["wrong: ours, attention-forward attention 8x"]),
        ([Row(CASE, "torch-jvp", "wrong", "error 1")], []),
        ([Row(CASE, "ours", "absent", "no")], []),
    ],
)
def test_exit_status(tmp_path, capsys, rows, red) -> None:
    assert report.main([str(write(tmp_path / "a.json", result(rows)))]) == int(bool(red))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(red)
    assert all(line.startswith(start) for line, start in zip(lines, red, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: No such file or directory"),
        ("{", "{path} is not JSON: "),
        ("{}", "{path} is not a result of the suite (KeyError: 'tangent_ops'): "),
        ("[1]", "{path} is not a result of the suite (TypeError: "),
    ],
)
def test_unusable_files(tmp_path, capsys, content, message) -> None:
    path = tmp_path / "suite.json"
    if content is not None:
        path.write_text(content)
    good = write(tmp_path / "good.json", result(ROWS))
    assert report.main([str(good), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message.format(path=path)) and err.count("\n") == 1


def test_nothing_measured(tmp_path) -> None:
    with pytest.raises(BadFile, match="nothing was measured"):
        read([write(tmp_path / "a.json", result([]))])


def test_pictures(tmp_path, monkeypatch) -> None:
    """Of made-up data: each can be read."""
    image = pytest.importorskip("matplotlib.image")
    from readable_pictures import assert_readable

    save = pictures.save
    monkeypatch.setattr(
        pictures, "save", lambda figure, path: assert_readable(figure) or save(figure, path)
    )
    rows = attention_rows([(8, 12, 50, 64), (8, 12, 197, 64)]) + model_rows(forward=0.9)
    file = write(tmp_path / "a.json", result(rows))
    report.main([str(file), "--plots", str(tmp_path / "out")])
    drawn = {path.name: image.imread(path) for path in (tmp_path / "out").iterdir()}
    assert set(drawn) == {
        "cpu-time-fp32-d64.png",
        "cpu-memory-fp32-d64.png",
        "cpu-roofline-fp32.png",
        "cpu-model-forward.png",
        "cpu-train-step.png",
    }
    assert all(min(one.shape[:2]) > 300 and one.std() > 0.05 for one in drawn.values())


def test_docs() -> None:
    page = "# A\n\n<!-- measured {} -->\nold\n<!-- /measured -->\n\nB\n"
    both = [result(ROWS), result(ROWS, gpu=True)]
    text = report.rewritten(page.format("cpu: attention-forward"), both)
    assert "old" not in text and text.startswith("# A\n") and text.endswith("\n\nB\n")
    table = report.table(both[0], ["attention-forward"])
    assert f"```text\n{table}\n```" in text and "NVIDIA" not in text
    assert "failed: no tangent" in table and "absent" not in table
    assert report.rewritten(text, both) == text
    assert "Not measured yet." in report.rewritten(page.format("gpu: epoch"), both[:1])
    models = report.rewritten(page.format("cpu: train-step"), [result([*ROWS, *model_rows()])])
    assert "== train-step" in models and "== model-forward" not in models
    assert cells(models, "taft-all")[1] == "510 ms" and "sdpa" not in models


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (report.si(1.5, "s"), "1.50 s"),
        (report.si(0.0123, "s"), "12.3 ms"),
        (report.si(2e-7, "s"), "0.200 µs"),
        (report.si(0, "B"), "0 B"),
        (report.si(999, "B"), "999 B"),
        (report.si(12.34e9, "B"), "12.3 GB"),
    ],
)
def test_units(found, words) -> None:
    assert found == words


def test_the_page_states_what_is_stored() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.rewritten(text, list(newest().values())) == text, "`make publish` writes it"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures and all((report.PAGE.parent / name).is_file() for name in pictures)
    drawn = {path.name for path in report.DOCS.glob("*.png")}
    assert drawn == {name.rpartition("/")[2] for name in pictures}
