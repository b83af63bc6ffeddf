"""The suite's layers: their providers are right, and a fault in one is found."""

from __future__ import annotations

import importlib

import pytest
import torch
from answers import CPU, errors, scaled

from benchmarks.suite import layers
from benchmarks.suite.case import Case
from benchmarks.suite.layer_ops import LAYERS
from benchmarks.suite.layers import ELEMENTWISE, LINEAR, STEP, LayerWorkload

WORKLOAD = LayerWorkload()
SMALL = [(ELEMENTWISE, op, (7, 48)) for op in LAYERS if op != "linear"]
SMALL += [(LINEAR, "linear", (7, 48, 24))]
PROVIDERS = ["ours", "torch-jvp", "compiled", "finite-differences", "plain"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled providers answer, by the formulas that they compile."""
    monkeypatch.setenv("TANGENT_OPS_BENCH_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    layers._compiled_formula.cache_clear()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("suffix", ["", STEP])
@pytest.mark.parametrize(("group", "op", "shape"), SMALL)
def test_every_provider_is_right(group, op, shape, suffix, dtype) -> None:
    found = errors(WORKLOAD, Case(group, op + suffix, shape, dtype))
    if dtype == "bf16":  # half of two digits: see finite_difference_slack
        found.pop("finite-differences", None)
    assert all(error is not None and error <= 1 for error in found.values()), found


@pytest.mark.parametrize(("suffix", "fault"), [("", "gelu_jvp"), (STEP, "gelu_vjp")])
def test_a_fault_is_found(monkeypatch, suffix, fault) -> None:
    module = importlib.import_module("tangent_ops.ops.activation")
    index = 1 if fault == "gelu_jvp" else None
    monkeypatch.setattr(module, fault, scaled(getattr(module, fault), 1.001, index))
    found = errors(WORKLOAD, Case(ELEMENTWISE, "gelu" + suffix, (7, 48), "fp32"))
    assert {name for name, error in found.items() if error is None or error > 1} == {"ours"}


@pytest.mark.parametrize("extent", ["default", "full"])
def test_cases_on_the_cpu(extent) -> None:
    cases = WORKLOAD.cases(CPU, extent)
    assert len(set(cases)) == len(cases)
    assert extent == "default" or {case.op for case in cases} >= LAYERS.keys()
    for group in WORKLOAD.groups:
        assert any(case.group == group for case in cases)
    for case in cases:
        names = [provider.name for provider in WORKLOAD.providers(case)]
        assert names == [n for n in PROVIDERS if n != "finite-differences" or STEP not in case.op]
        costs = {p.name: p.cost(case) for p in WORKLOAD.providers(case)}
        assert costs["ours"].flops > costs["plain"].flops > 0
        assert costs["ours"].bytes > costs["plain"].bytes > 0


def test_the_cpu_compiles_only_if_asked(monkeypatch) -> None:
    case = WORKLOAD.cases(CPU, "default")[0]
    compiled = WORKLOAD.providers(case)[2]
    monkeypatch.delenv("TANGENT_OPS_BENCH_COMPILE", raising=False)
    assert "TANGENT_OPS_BENCH_COMPILE=1" in (compiled.why_not(case, CPU) or "")
    assert compiled.why_not(case, torch.device("cuda")) is None
    monkeypatch.setenv("TANGENT_OPS_BENCH_COMPILE", "1")
    assert compiled.why_not(case, CPU) is None
