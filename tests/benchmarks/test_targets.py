"""Targets: met, not met, not measured; and of several cases the worst."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from made_up import model_rows, result, row

from benchmarks import bench_attention, report
from benchmarks.case import Case
from benchmarks.stored import Row
from benchmarks.targets import TARGETS, judge

DUAL_FORWARD, STEP, SAVED = TARGETS[:3]


def target(words: str):
    (found,) = (one for one in TARGETS if words in one.name)
    return found


def attention(group: str, shape, times: dict[str, float | None], causal=False, **more) -> list[Row]:
    case = Case(f"attention-{group}", "attention", shape, "bf16", causal)
    return [row(case, name, seconds, **more) for name, seconds in times.items()]


def compiled(step: float, peak: int) -> list[Row]:
    case = Case("train-step", "vit_base_patch16_224", (64,), "bf16")
    ours = row(case, "taft-all-compiled", step, peak_bytes=peak)
    return [ours, row(case, "finetune-compiled", 1.0, peak_bytes=100)]


HOME, LONG, LONGER = (64, 12, 197, 64), (4, 12, 4096, 64), (1, 12, 16384, 64)


@pytest.mark.parametrize(
    ("one", "good", "bad"),
    [(DUAL_FORWARD, 2.99, 3.01), (STEP, 1.69, 1.71), (SAVED, 1.09, 1.11)],
)
def test_on_a_cpu(one, good, bad) -> None:
    which = {DUAL_FORWARD: "forward", STEP: "step", SAVED: "saved"}[one]
    for value, verdict in ((good, "met"), (bad, "not met")):
        found = judge(one, result(model_rows(**{which: value})))
        assert (found.value, found.verdict) == (pytest.approx(value), verdict)
        assert found.where == "vit_small_patch16_224 8 fp32"


FORWARD_HOME = functools.partial(attention, "forward", HOME)
FORWARD_LONG = functools.partial(attention, "forward", LONG)
BACKWARD_HOME = functools.partial(attention, "backward", HOME)


@pytest.mark.parametrize(
    ("words", "rows", "value", "verdict"),
    [
        ("N197", FORWARD_HOME({"ours": 1.9, "sdpa-math": 4, "sdpa-flash": 1}), 1.9, "met"),
        ("N197", FORWARD_HOME({"ours": 2.1, "sdpa-cudnn": 1}), 2.1, "not met"),
        ("SDPA forward, N = 4096", FORWARD_LONG({"ours": 2, "sdpa-flash": 1}), 2, "met"),
        ("SDPA backward", BACKWARD_HOME({"ours": 0.99, "sdpa-flash": 1}), 0.99, "met"),
        ("SDPA backward", BACKWARD_HOME({"ours": 1.01, "sdpa-flash": 1}), 1.01, "not met"),
        ("torch.func.jvp", FORWARD_LONG({"ours": 1, "torch-jvp": 21}), 21, "met"),
        ("torch.func.jvp", FORWARD_LONG({"ours": 1, "torch-jvp": 19}), 19, "not met"),
        ("faster than jvp-", FORWARD_HOME({"ours": 1, "jvp-flash-attention": 3}), 3, "met"),
        ("ceiling", FORWARD_LONG({"ours": 1}, flops=0.66e12), 0.66, "met"),
        ("ceiling", FORWARD_LONG({"ours": 1}, flops=0.64e12), 0.64, "not met"),
        ("tangent step / fine-tuning step, both", compiled(1.68, 100), 1.68, "not met"),
        ("peak memory of the", compiled(1.8, 104), 1.04, "met"),
        ("peak memory of the", compiled(1.8, 106), 1.06, "not met"),
    ],
)
def test_on_a_gpu(words, rows, value, verdict) -> None:
    found = judge(target(words), result(rows, gpu=True))
    assert (found.value, found.verdict) == (pytest.approx(value), verdict)


def test_the_worst_case_counts() -> None:
    times = {"ours": 1.0, "sdpa-flash": 1.0}
    rows = attention("backward", HOME, times)
    rows += attention("backward", LONG, {**times, "ours": 1.3}, causal=True)
    found = judge(target("SDPA backward"), result(rows, gpu=True))
    assert (found.value, found.where) == (1.3, "attention 4x12x4096x64 bf16 causal")
    rows = FORWARD_LONG({"ours": 1}, flops=0.7e12)
    rows += attention("forward", LONGER, {"ours": 1}, flops=0.4e12)
    rows += FORWARD_HOME({"ours": 1}, flops=0.1e12)  # too short to count
    assert judge(target("ceiling"), result(rows, gpu=True)).value == pytest.approx(0.4)


@pytest.mark.parametrize(("bytes_per_token", "verdict"), [(1, "met"), (16, "not met")])
def test_linear_memory(bytes_per_token, verdict) -> None:
    rows = []
    for shape, per_token in (((16, 12, 1024, 64), 1), (LONGER, bytes_per_token)):
        peak = shape[0] * shape[1] * shape[2] * per_token
        rows += attention("forward", shape, {"ours": 1}, peak_bytes=peak)
    found = judge(target("linear: 1"), result(rows, gpu=True))
    assert (found.value, found.verdict) == (bytes_per_token, verdict)
    assert found.where == "N = 1024 to 16384, D = 64"


def test_a_wrong_answer_of_ours_is_not_met() -> None:
    rows = FORWARD_HOME({"sdpa-flash": 1})
    for status in ("wrong", "failed", "absent"):
        verdict = "not measured" if status == "absent" else "not met"
        ours = Row(rows[0].case, "ours", status, "a note")
        found = judge(target("N197"), result([*rows, ours], gpu=True))
        assert (found.value, found.verdict) == (None, verdict)
        assert found.where == f"attention 64x12x197x64 bf16: ours: {status}: a note"
    long = Row(Case("attention-forward", "attention", LONG, "bf16"), "ours", "wrong", "a note")
    assert judge(target("ceiling"), result([long], gpu=True)).verdict == "not met"


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([], "no such case"),
        (FORWARD_LONG({"ours": 1}), "4x12x4096x64 bf16: no torch-jvp"),
        (FORWARD_LONG({"ours": 1, "torch-jvp": None}), "failed: out of memory"),
    ],
)
def test_not_measured(rows, where) -> None:
    rows = rows or FORWARD_HOME({"ours": 1, "torch-jvp": 30})
    found = judge(target("torch.func.jvp"), result(rows, gpu=True))
    assert (found.value, found.verdict) == (None, "not measured")
    assert where in found.where


def test_memory_that_is_not_known() -> None:
    rows = [replace(one, saved_bytes=None) for one in model_rows()]
    found = judge(SAVED, result(rows))
    assert found.verdict == "not measured"
    assert found.where.endswith("8 fp32: not measured")


def test_another_device() -> None:
    assert judge(STEP, result(model_rows(), gpu=True)).where == "a target for a CPU"
    found = judge(target("N197"), result(model_rows()))
    assert (found.where, found.verdict) == ("a target for a GPU", "not measured")


def test_the_table() -> None:
    lines = report.targets_table(result(model_rows(step=1.75))).splitlines()
    assert len(lines) == 1 + len(TARGETS)
    (step,) = (line for line in lines if "tangent step / fine-tuning step, ViT-S/16" in line)
    assert step.split()[-6:-3] == ["1.750", "not", "met"] and "<= 1.70" in step
    assert sum("not measured" in line for line in lines) == len(TARGETS) - 3


def test_the_home_shapes_have_every_target_of_attention() -> None:
    cases = bench_attention.SUITE.cases(torch.device("cuda"), "home")
    names = ("ours", "sdpa-flash", "torch-jvp", "jvp-flash-attention")
    rows = [row(case, name, 1.0, peak_bytes=100, flops=1e12) for case in cases for name in names]
    found = {one.name: judge(one, result(rows, gpu=True)).verdict for one in TARGETS}
    measured = {name for name, verdict in found.items() if verdict != "not measured"}
    assert measured == {one.name for one in TARGETS if one.name.startswith("attention")}
