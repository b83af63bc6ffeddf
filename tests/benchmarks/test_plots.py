"""Pictures: drawn from what is there, of the numbers that are there."""

from __future__ import annotations

import struct
import sys

import pytest
from made_up import ENVIRONMENT, attention_rows, model_rows, result, write
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from benchmarks import drawing, plots
from benchmarks.drawing import COLOURS, colour
from benchmarks.plots import draw_all
from benchmarks.suite.row import Result

VIT = [(8, 12, n, 64) for n in (50, 197, 577)]
CPU = result(attention_rows(VIT) + model_rows())


@pytest.fixture
def figures(monkeypatch):
    """What would be saved, by the file's name."""
    kept = {}

    def save(figure, path, title, result, note=""):
        kept[path.name] = figure
        return path

    monkeypatch.setattr(plots, "save", save)
    yield kept
    plt.close("all")


def test_every_picture(tmp_path) -> None:
    drawn = draw_all(CPU, tmp_path)
    names = {kind: [path.name for path in paths] for kind, paths in drawn.items()}
    assert names == {
        "time": ["cpu-time-fp32-d64.png"],
        "memory": ["cpu-memory-fp32-d64.png"],
        "roofline": ["cpu-roofline-fp32.png"],
        "ViT attention": ["cpu-vit-attention-fp32-h12-d64.png"],
        "models": ["cpu-model-forward-fp32-b8.png", "cpu-train-step-fp32-b8.png"],
    }
    files = sorted(tmp_path.iterdir())
    assert files == sorted(path for paths in drawn.values() for path in paths)  # nothing partial
    for path in files:
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:4] == b"\x89PNG" and len(content) > 20_000
        assert 700 < width < 2000 and 400 < height < 2000
    assert not plt.get_fignums()


def test_times_are_those_of_one_head(figures, tmp_path) -> None:
    draw_all(CPU, tmp_path)
    forward, backward, second = figures["cpu-time-fp32-d64.png"].axes
    assert backward.get_title() == "backward of the tangent"
    (line,) = (one for one in forward.lines if one.get_color() == COLOURS["torch-jvp"])
    rows = [r for r in CPU.rows if r.provider == "torch-jvp" and r.case.group[10:] == "forward"]
    assert list(line.get_xdata()) == [50, 197, 577]
    assert list(line.get_ydata()) == pytest.approx([(r.seconds or 0) / 96 for r in rows])
    assert len(second.lines) == 5  # the absent one is not there


def test_a_length_is_drawn_once(figures, tmp_path) -> None:
    """Of 12 and 16 heads the first, and a length alone is no line."""
    rows = attention_rows([(8, 12, 50, 64), (8, 12, 197, 64), (8, 16, 197, 64)])
    draw_all(result([*rows, *attention_rows([(8, 12, 50, 32)])]), tmp_path)
    assert [name for name in figures if "time" in name] == ["cpu-time-fp32-d64.png"]
    (line,) = (x for x in figures["cpu-time-fp32-d64.png"].axes[0].lines if x.get_linewidth() > 2)
    assert list(line.get_xdata()) == [50, 197]


def test_causal_and_dtypes_have_pictures_of_their_own(figures, tmp_path) -> None:
    rows = attention_rows(VIT) + attention_rows(VIT, causal=True) + attention_rows(VIT, "bf16")
    draw_all(result(rows, gpu=True), tmp_path)
    device = "nvidia-example-gpu"
    assert {name for name in figures if "memory" in name} == {
        f"{device}-memory-fp32-d64.png",
        f"{device}-memory-fp32-d64-causal.png",
        f"{device}-memory-bf16-d64.png",
    }
    bars = {name for name in figures if "vit" in name}  # a ViT is not causal
    assert bars == {f"{device}-vit-attention-{x}-h12-d64.png" for x in ("fp32", "bf16")}


def test_bars_are_ratios(figures, tmp_path) -> None:
    draw_all(CPU, tmp_path)
    (time, memory) = figures["cpu-train-step-fp32-b8.png"].axes
    heights = {to_hex(bar.get_facecolor()).upper(): bar.get_height() for bar in time.patches}
    expected = {colour("taft-all"): 1.7, colour("taft-1"): 0.5, colour("finetune"): 1.0}
    assert heights == {key: pytest.approx(value) for key, value in expected.items()}
    assert [round(line.get_ydata()[0], 3) for line in time.lines] == [1, 1.667]
    assert max(bar.get_height() for bar in memory.patches) == pytest.approx(1.1)
    forward = figures["cpu-vit-attention-fp32-h12-d64.png"].axes[0]
    assert max(bar.get_height() for bar in forward.patches) == plots.CLIP
    assert "90" in {text.get_text().strip() for text in forward.texts}
    assert [text.get_text() for text in forward.get_xticklabels()] == ["50", "197", "577"]


def test_the_roof_is_that_of_the_machine(figures, tmp_path) -> None:
    draw_all(CPU, tmp_path)
    (axis,) = figures["cpu-roofline-fp32.png"].axes
    (roof,) = axis.lines
    knee = (roof.get_xdata()[1], roof.get_ydata()[1])
    assert knee == (10, 1e11)  # 1e11 FLOP/s over 1e10 bytes/s
    assert roof.get_ydata()[0] == pytest.approx(1e10 * roof.get_xdata()[0])
    points = [tuple(one.get_offsets()[0]) for one in axis.collections]
    row = CPU.rows[0]
    assert points[0] == pytest.approx((row.flops / row.bytes, row.flops / (row.seconds or 1)))


def test_colours_tell_providers_apart() -> None:
    attention = ["ours", "torch-jvp", "compiled", "jvp-flash-attention", "finite-differences"]
    attention += ["sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"]
    models = ["taft-all", "taft-1", "taft-1-cached", "finetune", "finetune-1", "torch-jvp"]
    models += ["finite-differences"]
    for names in (attention, models):
        assert len({colour(name) for name in names}) == len(names)
    assert colour("taft-all-compiled") == colour("taft-all")
    assert drawing.hatch("taft-all-compiled") and not drawing.hatch("taft-all")
    assert colour("another's") == drawing.UNKNOWN


def test_conditions_are_in_the_picture(monkeypatch, tmp_path) -> None:
    figure, _ = drawing.side_by_side(1)
    drawing.legend(figure, ["ours"])
    drawing.save(figure, tmp_path / "a.png", "A title", CPU, "A note.")
    words = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "A title" in words and "A note." in words
    for part in ("An Example CPU, 2 cores", "2 threads", "torch 2.14.0", "commit 0123456789ab"):
        assert part in words
    assert ENVIRONMENT["date"] in words


# --- the command ---------------------------------------------------------------------------------


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["plots", *map(str, arguments)])
    return plots.main()


def test_what_has_no_data_is_said(tmp_path, monkeypatch, capsys) -> None:
    path, out = write(tmp_path / "suite.json", result(model_rows())), tmp_path / "a" / "b"
    assert run(monkeypatch, path, "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    missing = ("time", "memory", "roofline", "ViT attention")
    assert lines[:4] == [f"cpu: no data for pictures of {kind}" for kind in missing]
    assert lines[4:] == [str(path) for path in sorted(out.iterdir())]


def test_the_newest_of_each_device(tmp_path, monkeypatch, capsys, figures) -> None:
    """Its date decides, not its folder's name."""
    new = Result({**ENVIRONMENT, "date": "2026-12-01 08:00 UTC"}, {}, model_rows())
    old = Result({**ENVIRONMENT, "date": "2026-11-30 08:00 UTC"}, {}, attention_rows(VIT))
    write(tmp_path / "results" / "1-cpu" / "suite.json", new)
    write(tmp_path / "results" / "2-cpu" / "suite.json", old)
    write(tmp_path / "results" / "3-gpu" / "suite.json", result(model_rows(), gpu=True))
    (tmp_path / "results" / "4-other").mkdir()
    monkeypatch.setattr(plots, "RESULTS", tmp_path / "results")
    assert run(monkeypatch, "--out", tmp_path / "out") == 0
    assert len(figures) == 4 and "cpu-train-step-fp32-b8.png" in figures
    assert "nvidia-example-gpu-train-step-fp32-b8.png" in figures


def test_unusable_arguments(tmp_path, monkeypatch, capsys) -> None:
    good = write(tmp_path / "suite.json", CPU)
    twin = write(tmp_path / "twin.json", CPU)
    empty = write(tmp_path / "empty.json", result([]))
    monkeypatch.setattr(plots, "RESULTS", tmp_path / "none")
    out = tmp_path / "out"
    for arguments, message in (
        ([good, "--out", good], f"--out {good} is a file: name a folder"),
        ([good, "--out", good / "x"], f"--out {good / 'x'}: Not a directory"),
        ([good, empty, "--out", out], f"{empty} has no rows: nothing was measured"),
        ([good, twin, "--out", out], "two files of cpu: draw them into folders of their own"),
        (["--out", out], f"{tmp_path / 'none'} holds no result: name a FILE"),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert capsys.readouterr() == ("", message + "\n")
    assert not out.exists()
