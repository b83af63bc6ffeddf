"""The attention cases: their oracle, and every provider that runs here, on small shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.suite.attention import BACKWARD, FORWARD, SECOND, AttentionWorkload
from benchmarks.suite.case import Case
from benchmarks.suite.measure import relative_error

CPU = torch.device("cpu")
WORKLOAD = AttentionWorkload()
CASES = [
    Case(group, "attention", (3, 4, 10, 8), "fp32", causal)
    for group, causal in itertools.product((FORWARD, BACKWARD, SECOND), (False, True))
]


def here(case: Case):
    return [p for p in WORKLOAD.providers(case) if p.why_not(case, CPU) is None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_provider_is_right(case: Case) -> None:
    inputs = WORKLOAD.inputs(case, CPU, 0)
    exact = WORKLOAD.expected(case, inputs)
    assert all(x.dtype == torch.float64 for x in exact)
    names = [provider.name for provider in here(case)]
    assert names[0] == "ours" and {"torch-jvp", "sdpa-flash", "sdpa-math"} <= set(names)
    for provider in here(case):
        found = WORKLOAD.compared(case, provider.prepare(case, inputs)())
        error = relative_error(found, exact)
        assert error is not None and error <= WORKLOAD.bound(case) * provider.slack, provider.name
        if provider.name == "ours":
            assert len(found) == len(exact) == {FORWARD: 2, BACKWARD: 3, SECOND: 6}[case.group]


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_oracle_is_the_derivative(case: Case) -> None:
    """Against central differences of PyTorch's own attention in float64."""
    inputs = WORKLOAD.inputs(case, CPU, 0)
    primals, tangents = ([x.double() for x in xs] for xs in (inputs.primals, inputs.tangents))

    def run(step: float):
        moved = (p + step * t for p, t in zip(primals, tangents, strict=True))
        return torch.nn.functional.scaled_dot_product_attention(*moved, is_causal=case.causal)

    slope = (run(1e-5) - run(-1e-5)) / 2e-5
    output, output_t = WORKLOAD.expected(case, inputs)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(output, WORKLOAD.compared(case, (run(0.0),))[0], **close)
    torch.testing.assert_close(output_t, WORKLOAD.compared(case, (slope,))[0], **close)


@pytest.mark.parametrize("where", [(0, 0), (2, 3)])
def test_a_fault_at_either_end_is_seen(where) -> None:
    case = CASES[0]
    inputs = WORKLOAD.inputs(case, CPU, 0)
    output, output_t = WORKLOAD.providers(case)[0].prepare(case, inputs)()
    output_t[where] *= 1.01
    found = WORKLOAD.compared(case, (output, output_t))
    error = relative_error(found, WORKLOAD.expected(case, inputs))
    assert error is not None and error > WORKLOAD.bound(case)


def test_cases_differ_and_belong_to_their_groups() -> None:
    for extent in ("default", "full"):
        cases = WORKLOAD.cases(CPU, extent)
        assert len(set(cases)) == len(cases)
        assert {case.group for case in cases} == set(WORKLOAD.groups)
    on_cuda = WORKLOAD.cases(torch.device("cuda"), "full")
    assert Case(FORWARD, "attention", (64, 12, 197, 64), "bf16") in on_cuda
    assert Case(SECOND, "attention", (1, 12, 16384, 128), "bf16", causal=True) in on_cuda
