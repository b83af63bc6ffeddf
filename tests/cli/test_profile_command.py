"""The command `tangent-ops profile`."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import torch
from cli_runs import complaint, refused
from typer.testing import Result

import tangent_ops.profiling.profile as profiling
from tangent_ops.profiling.families import FAMILIES
from tangent_ops.profiling.sides import build

SMALL = ("--model", "test_vit", "--batch", "1", "--steps", "2", "--warmup", "1", "--device", "cpu")


run = partial(cli_runs.run, "profile", KINETO_LOG_LEVEL="99")


def failing(name: str, error: Exception) -> Callable[..., Any]:
    """`build` that raises for one side."""

    def build_or_raise(side: str, settings: Any) -> Any:
        if side == name:
            raise error
        return build(side, settings)

    return build_or_raise


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("profile") / "made" / "for it"
    return run(*SMALL, "--mode", "train", "--out", str(out)), out


def test_both_rivals_are_shown_beside_ours(done: tuple[Result, Path]) -> None:
    result, out = done
    assert result.exit_code == 0, result.output
    for words in ("tangent-ops", "torch-jvp", "finetune", *FAMILIES, "wall time", "peak memory"):
        assert words in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "profile.json", "report.html", *(f"{n}.json.gz" for n in names_of(out)),
    }  # fmt: skip


def names_of(out: Path) -> list[str]:
    found = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    return [side["name"] for side in found["sides"]]


def test_the_numbers_hang_together(done: tuple[Result, Path]) -> None:
    _, out = done
    found = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert names_of(out) == ["tangent-ops", "torch-jvp", "finetune"]
    assert found["environment"]["torch"] == torch.__version__
    # A step holds at least the gradients, as large as the weights are.
    weights = sum(
        4 * p.numel() for p in profiling.build.__globals__["create"]("test_vit").parameters()
    )
    for side in found["sides"]:
        assert side["error"] is None
        assert list(side["families"]) == list(FAMILIES)
        assert min(side["families"][name] for name in ("attention", "GEMM", "norm")) > 0
        assert len(side["wall"]) == 2 and len(side["top"]) == 10
        assert sum(one["milliseconds"] for one in side["top"]) <= sum(side["families"].values())
        assert side["peak"] >= weights


def test_traces_are_of_their_own_side(done: tuple[Result, Path]) -> None:
    own = {
        "tangent-ops": "AttentionInParts",
        "torch-jvp": "aten::_scaled_dot_product_attention_math",
        "finetune": "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
    depth = 6
    calls = dict.fromkeys(own, depth) | {"tangent-ops": depth - 1}  # the last one has a single row
    for name in own:
        with gzip.open(done[1] / f"{name}.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        for other, mark in own.items():
            assert names.count(mark) == (calls[name] if other == name else 0)  # of one step


def test_a_forward_pass_has_no_backward(tmp_path: Path) -> None:
    result = run(*SMALL, "--mode", "forward", "--against", "finetune", "--dtype", "bf16",
                 "--out", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert names_of(tmp_path) == ["tangent-ops", "finetune"]
    for name in names_of(tmp_path):
        with gzip.open(tmp_path / f"{name}.json.gz", "rt") as file:
            assert "evaluate_function" not in file.read()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
        (ValueError("too [bold]odd\nand more"), "ValueError: too [bold]odd"),
    ],
)
def test_a_rival_that_fails_is_a_result(
    error: Exception, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "build", failing("torch-jvp", error))
    result = run(*SMALL, "--mode", "forward", "--against", "torch-jvp", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"torch-jvp failed: {shown}\n" in result.stdout
    sides = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["sides"]
    assert [side["error"] for side in sides] == [None, shown]
    assert f"failed: {shown}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_ours_failing_is_an_error_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "build", failing("tangent-ops", RuntimeError("no")))
    result = run(*SMALL, "--mode", "forward", "--against", "finetune", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "tangent-ops failed: RuntimeError: no" in result.stdout
    assert (tmp_path / "report.html").exists()


# Options -> a pattern of the message.
REFUSED = {
    "--model vit_bas_patch16_224": ".* has no such model; did you mean vit_base_patch16_224",
    "--model zzzzzz": r".* has no such model; timm\.list_models\(\) lists them",
    "--batch 0": "expected 1 or more",
    "--steps 0": "expected 1 or more",
    "--warmup 0": "expected 1 or more",
    "--dtype float32": "expected fp32, bf16 or fp16",
    "--against finetune --against jvp": "expected torch-jvp or finetune",
    "--mode training": r"expected forward or train; did you mean train\?",
    "--device gpu": "expected cpu, cuda or cuda:N",
    "--device mps": "expected cpu, cuda or cuda:N",
    "--device cuda:99": "(PyTorch .* finds no CUDA device|expected cuda:0 to)",
    "--blocks 99": ".*expected 0 to 12",
    "--model resnet18 --blocks 1": ".*no `blocks`",
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any) -> None:
        pytest.fail("work began")

    monkeypatch.setattr(profiling, "compare", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("options", "message"), REFUSED.items(), ids=REFUSED)
def test_bad_options_are_refused_before_any_work(
    options: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, _, bad = options.rpartition("--")
    found = complaint(run("--device", "cpu", *options.split(), "--out", out))
    assert re.match(f"--{bad}: {message}", found)
    assert not out.exists()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_is_no_output_folder(inside: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(run(*SMALL, "--out", file / inside), "is a file; give a folder")
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("no_work")
def test_cuda_without_a_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*SMALL, "--device", "cuda", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "--device cuda: PyTorch" in result.stderr and "--device cpu" in result.stderr
