"""Pages state what the stored results say, and a page that does not is noticed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from made_up import ENVIRONMENT, attention_rows, model_rows, result, write

from benchmarks import publish
from benchmarks.publish import FIGURES, NOT_MEASURED, text_of
from benchmarks.suite.row import Result

PAGE = """# A page

<!-- measured:cpu-ratios -->
<!-- /measured -->

Between.

<!-- measured:gpu-attention -->
of old
<!-- /measured -->
The end.
"""
CPU = result(attention_rows([(8, 12, 50, 64)]) + model_rows(forward=3.1, step=1.69, saved=1.0))
CONDITIONS = (
    "Medians. An Example CPU, 2 cores, 2 threads, torch 2.14.0, commit 0123456789ab, "
    "2026-11-24 12:00 UTC; `make bench`."
)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page, and a folder of results beside it."""
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    monkeypatch.setattr(publish, "PAGES", (path,))
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    write(tmp_path / "results" / "1-cpu" / "suite.json", CPU)
    return path


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["publish", *arguments])
    return publish.main()


def test_written_between_the_markers(page, monkeypatch, capsys) -> None:
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{page}: cpu-ratios written",
        f"{page}: gpu-attention written",
    ]
    text = page.read_text()
    start, rest = text.split("<!-- measured:cpu-ratios -->\n")
    ratios, rest = rest.split("\n<!-- /measured -->\n", 1)
    assert (start, ratios) == ("# A page\n\n", text_of("cpu-ratios", [CPU]))
    assert rest == (
        "\nBetween.\n\n<!-- measured:gpu-attention -->\n"
        f"{NOT_MEASURED}\n<!-- /measured -->\nThe end.\n"
    )
    assert [path.name for path in page.parent.iterdir() if path.is_file()] == ["README.md"]


def test_stale_is_noticed(page, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--check") == 1
    assert page.read_text() == PAGE
    assert capsys.readouterr().out.splitlines() == [
        f"{page}: cpu-ratios is stale",
        f"{page}: gpu-attention is stale",
    ]
    assert run(monkeypatch) == 0
    capsys.readouterr()
    assert run(monkeypatch, "--check") == 0
    assert capsys.readouterr().out == "every measured figure is that of the stored results\n"
    page.write_text(page.read_text().replace("1.690", "1.590"))  # by hand
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().out == f"{page}: cpu-ratios is stale\n"


def test_a_newer_result_makes_a_page_stale(page, monkeypatch, capsys) -> None:
    run(monkeypatch)
    newer = Result({**ENVIRONMENT, "date": "2026-12-24 12:00 UTC"}, {}, model_rows())
    write(page.parent / "results" / "0-cpu" / "suite.json", newer)
    assert run(monkeypatch, "--check") == 1
    write(page.parent / "results" / "2-gpu" / "suite.json", result(model_rows(), gpu=True))
    capsys.readouterr()
    assert run(monkeypatch, "--check") == 1
    assert "gpu-attention is stale" in capsys.readouterr().out


def test_ratios() -> None:
    lines = text_of("cpu-ratios", [CPU]).splitlines()
    assert lines == [
        "|  | measured | target |  |",
        "| --- | --- | --- | --- |",
        "| dual forward / plain forward, ViT-S/16, batch 8, fp32 | 3.100 | <= 3.00 | not met |",
        "| tangent step / fine-tuning step, ViT-S/16, batch 8, fp32 | 1.690 | <= 1.70 | met |",
        "| bytes saved for backward, tangent / fine-tuning, ViT-S/16, batch 8, fp32 | 1.000 "
        "| <= 1.10 | met |",
        "",
        CONDITIONS,
    ]


def test_attention() -> None:
    text = text_of("cpu-attention", [CPU])
    assert text.count("| B x H x N x D | ours | torch-jvp | compiled | ") == 3
    row = "| 8x12x50x64 | 3.69 ms (3.60x) | 92.2 ms (90.00x) | 9.22 ms (9.00x) "
    assert row + "| 1.02 ms (sdpa-flash) |" in text
    assert "Backward of the tangent, fp32:\n\n|" in text and text.endswith(CONDITIONS)
    assert "cudnn" not in text
    broken = [replace(one, timing=None) if one.provider == "ours" else one for one in CPU.rows]
    more = attention_rows([(8, 12, 197, 64)])
    assert "| 8x12x50x64 | – | 92.2 ms" in text_of("cpu-attention", [result([*broken, *more])])


def test_attention_of_every_gpu_and_none_of_a_cpu() -> None:
    one = result(attention_rows([(64, 12, 197, 64)], "bf16"), gpu=True)
    other = replace(one, environment={**one.environment, "gpu": "Another"})
    text = text_of("gpu-attention", [CPU, one, other])
    assert text.count("| 64x12x197x64 | ") == 6 and "8x12x50x64" not in text
    assert "Medians. NVIDIA Example GPU, torch" in text and "Medians. Another, torch" in text
    assert "threads" not in text and "`make gpu-bench`" in text


def test_end_to_end() -> None:
    lines = text_of("end-to-end", [CPU]).splitlines()
    assert lines[2:5] == [
        "| vit_small_patch16_224, batch 8, fp32 | taft-all | 310 ms (3.10x) | 507 ms (1.69x) "
        "| 100 MB | 330 MB |",
        "| vit_small_patch16_224, batch 8, fp32 | taft-1 | 50.0 ms (0.50x) | 150 ms (0.50x) "
        "| 100 MB | 300 MB |",
        "| vit_small_patch16_224, batch 8, fp32 | finetune | 100 ms (1.00x) | 300 ms (1.00x) "
        "| 100 MB | 300 MB |",
    ]
    assert "torch-jvp" not in "".join(lines)  # it failed everywhere


def test_compiled_models_come_from_their_own_file(page, monkeypatch) -> None:
    page.write_text("<!-- measured:compiled -->\n<!-- /measured -->\n")
    run(monkeypatch)
    assert NOT_MEASURED in page.read_text()
    write(page.parent / "results" / "2-cpu" / "compiled.json", result(model_rows(step=1.5)))
    run(monkeypatch)
    text = page.read_text()
    assert "(1.50x)" in text and "1.69" not in text and text.count("make bench-compiled") == 1


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_to_state(name) -> None:
    assert text_of(name, []) == NOT_MEASURED
    nothing = result(attention_rows([(8, 12, 50, 64)], groups=[]), gpu="gpu" in name)
    assert NOT_MEASURED in text_of(name, [nothing]) or "not measured" in text_of(name, [nothing])


def test_malloc_is_a_condition() -> None:
    kept = replace(CPU, environment={**ENVIRONMENT, "malloc": "MALLOC_TRIM_THRESHOLD_=1"})
    assert text_of("cpu-ratios", [kept]).endswith(", `MALLOC_TRIM_THRESHOLD_=1`; `make bench`.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAGE + "<!-- measured:speed -->\n<!-- /measured -->\n", "unknown measured:speed; there"),
        (PAGE + "<!-- measured:end-to-end -->\n", "measured:end-to-end is not closed by <!-- /"),
        (PAGE.replace("<!-- /measured -->", "", 1), "measured:cpu-ratios is not closed by <!--"),
        (None, "No such file or directory"),
    ],
)
def test_unusable_pages(page, monkeypatch, capsys, text, message) -> None:
    """Nothing is written, not even the page before it."""
    other = page.with_name("other.md")
    if text is not None:
        other.write_text(text)
    monkeypatch.setattr(publish, "PAGES", (page, other))
    assert run(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{other}: {message}") and err.count("\n") == 1
    assert page.read_text() == PAGE


def test_unusable_results(page, monkeypatch, capsys) -> None:
    bad = page.parent / "results" / "2-cpu" / "suite.json"
    bad.parent.mkdir()
    bad.write_text("{")
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"{bad} is not JSON")
    assert page.read_text() == PAGE
