"""The suite's epochs: TAFT-1 ends where a loop in float64 ends, and a fault is found."""

from __future__ import annotations

import importlib

import pytest
from answers import CPU, errors, scaled

from benchmarks.suite.case import Case
from benchmarks.suite.epochs import EPOCH, EpochWorkload

WORKLOAD = EpochWorkload()
PROVIDERS = ["taft-1-cached", "taft-1-cached-first", "taft-1", "finetune", "finetune-1", "taft-all"]


def tiny(dtype: str) -> Case:
    return Case(EPOCH, "test_vit", (6, 2), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_taft_1_is_right(dtype) -> None:
    found = errors(WORKLOAD, tiny(dtype))
    assert list(found) == PROVIDERS
    for name, error in found.items():
        compared = name.startswith("taft-1")
        assert (error is not None and error <= 1) if compared else error is None, found


def test_a_fault_is_found(monkeypatch) -> None:
    module = importlib.import_module("tangent_ops.ops.activation")
    monkeypatch.setattr(module, "gelu_jvp", scaled(module.gelu_jvp, 1.1, 1))
    found = errors(WORKLOAD, tiny("fp32"))
    wrong = [name for name, error in found.items() if error is not None and error > 1]
    assert wrong == PROVIDERS[:3], found


def test_every_call_starts_from_the_same_point() -> None:
    case = tiny("fp32")
    inputs = WORKLOAD.inputs(case, CPU, 0)
    call = WORKLOAD.providers(case)[0].prepare(case, inputs)
    assert all((one == two).all() for one, two in zip(call(), call(), strict=True))


@pytest.mark.parametrize("extent", ["default", "full"])
def test_cases_on_the_cpu(extent) -> None:
    for case in WORKLOAD.cases(CPU, extent):
        assert case.group == EPOCH
        cost = {p.name: p.cost(case).flops for p in WORKLOAD.providers(case)}
        assert list(cost) == PROVIDERS
        assert cost["taft-1-cached"] < cost["taft-1"] < cost["finetune"] < cost["taft-all"]
