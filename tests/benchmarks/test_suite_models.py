"""The suite's whole models: their providers are right, and a fault in one is found."""

from __future__ import annotations

import importlib

import pytest
import torch
from answers import CPU, errors, scaled

from benchmarks.suite.case import Case
from benchmarks.suite.models import FORWARD, STEP, ModelWorkload
from tangent_ops.profiling.memory import saved_bytes

WORKLOAD = ModelWorkload()
TINY = "test_vit"  # of timm: 6 blocks, width 64, 160 pixels
PROVIDERS = {
    FORWARD: "taft-all taft-1 taft-1-cached finetune torch-jvp finite-differences",
    STEP: "taft-all taft-1 taft-1-cached finetune finetune-1 torch-jvp",
}
COMPILED = ["taft-all-compiled", "taft-1-compiled", "finetune-compiled"]


def tiny(group: str, dtype: str = "fp32") -> Case:
    return Case(group, TINY, (2,), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("group", WORKLOAD.groups)
def test_every_provider_is_right(monkeypatch, group, dtype) -> None:
    monkeypatch.setenv("TANGENT_OPS_BENCH_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = errors(WORKLOAD, tiny(group, dtype))
    assert list(found) == PROVIDERS[group].split() + COMPILED
    if dtype == "bf16":  # half of two digits: see finite_difference_slack
        found.pop("finite-differences", None)
    if dtype == "fp16":  # PyTorch's own rules overflow
        found.pop("torch-jvp")
    assert all(error is not None and error <= 1 for error in found.values()), found


@pytest.mark.parametrize(
    ("group", "op", "fault", "index"),
    [
        (FORWARD, "gelu", "gelu_jvp", 1),
        (STEP, "gelu", "gelu_vjp", None),
        (STEP, "gelu", "gelu_jvp", 1),  # its gradients are right, but taken at a wrong point
    ],
)
def test_a_fault_is_found(monkeypatch, group, op, fault, index) -> None:
    module = importlib.import_module(f"tangent_ops.ops.{op}")
    monkeypatch.setattr(module, fault, scaled(getattr(module, fault), 1.01, index))
    found = errors(WORKLOAD, tiny(group))
    wrong = {name for name, error in found.items() if error is None or error > 1}
    assert wrong == {"taft-all", "taft-1", "taft-1-cached"}, found


def test_taft_saves_no_more_than_finetuning() -> None:
    """And what is saved shows around the calls that are timed."""
    case = tiny(STEP)
    inputs = WORKLOAD.inputs(case, CPU, 0)
    saved = {}
    for provider in WORKLOAD.providers(case):
        if provider.why_not(case, CPU) is None:
            saved[provider.name] = saved_bytes(provider.prepare(case, inputs))
    assert saved["finetune"] / 10 < saved["taft-all"] < 1.2 * saved["finetune"]
    assert saved["taft-1"] < saved["taft-all"] / 3
    assert saved["torch-jvp"] > 1.2 * saved["taft-all"]


@pytest.mark.parametrize("extent", ["default", "full"])
def test_cases_on_the_cpu(monkeypatch, extent) -> None:
    monkeypatch.delenv("TANGENT_OPS_BENCH_COMPILE", raising=False)
    cases = WORKLOAD.cases(CPU, extent)
    assert {case.group for case in cases} == set(WORKLOAD.groups)
    for case in cases:
        absent = [p.name for p in WORKLOAD.providers(case) if p.why_not(case, CPU)]
        assert absent == COMPILED


@pytest.mark.parametrize("group", WORKLOAD.groups)
def test_costs(group) -> None:
    case = tiny(group)
    cost = {p.name: p.cost(case) for p in WORKLOAD.providers(case)}
    plain = 1 if group == FORWARD else 3
    tangent = 3 if group == FORWARD else 5
    assert cost["taft-all"].flops / cost["finetune"].flops == pytest.approx(tangent / plain)
    assert cost["taft-all"] == cost["torch-jvp"] == cost["taft-all-compiled"]
    for of in ("flops", "bytes"):
        all_of_it, last, cached = (
            getattr(cost[name], of) for name in ("taft-all", "taft-1", "taft-1-cached")
        )
        assert all_of_it > last > cached > 0
