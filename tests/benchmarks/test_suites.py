"""The benchmarks' suites: every provider is right on small cases, and a wrong one gets no time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, bench_layers, bench_models, bench_steps, ops
from benchmarks.bench_attention import BACKWARD, FORWARD, KINDS, SECOND
from benchmarks.bench_layers import LAYERS
from benchmarks.case import COMPILE_ON_CPU, Case, Cost, Provider, Suite
from benchmarks.measure import NotTimedError, Prepared, relative_error

CPU = torch.device("cpu")
ATTENTION = [
    Case(group, "attention", (3, 4, 10, 8), "fp32", causal)
    for group, causal in itertools.product(KINDS, (False, True))
]
STEPS = [
    Case("linear" if op == "linear" else "elementwise", op + suffix, (7, 48), dtype)
    for op, suffix, dtype in itertools.product(LAYERS, ("", "-step"), ("fp32", "bf16", "fp16"))
]
STEPS = [replace(one, shape=(7, 48, 24)) if one.group == "linear" else one for one in STEPS]
MODELS = [
    Case(group, "test_vit", (2,), dtype)  # of timm: 6 blocks, width 64, 160 pixels
    for group, dtype in itertools.product(("model-forward", "train-step"), ("fp32", "bf16", "fp16"))
]
CASES = [
    *((bench_attention.SUITE, case) for case in ATTENTION),
    *((bench_layers.SUITE, case) for case in STEPS),
    *((bench_models.SUITE, case) for case in MODELS),
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled providers run what they compile."""
    monkeypatch.setenv(COMPILE_ON_CPU, "1")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ops._compiled_jvp.cache_clear()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("suite", "case"), CASES, ids=[f"{c.group} {c}" for _, c in CASES])
def test_every_provider_is_right(suite: Suite, case: Case) -> None:
    prepared = Prepared(suite, case, CPU)
    assert prepared.exact and all(one.dtype == torch.float64 for one in prepared.exact[1:])
    for provider in suite.providers(case):
        if case.dtype == "bf16" and provider.question == "finite-differences":  # half of two digits
            continue
        if case.dtype == "fp16" and provider.name == "torch-jvp" and case.op == "test_vit":
            continue  # PyTorch's own rules overflow
        if provider.missing(case, CPU):
            continue
        prepared.checked_call(provider)
        assert prepared.errors[provider.name] is not None


@pytest.mark.parametrize("case", ATTENTION[:2], ids=str)
def test_the_oracle_of_attention_is_the_derivative(case: Case) -> None:
    """Against central differences of PyTorch's own attention in float64."""
    suite = bench_attention.SUITE
    inputs = suite.inputs(case, CPU, 0)
    primals, tangents = ([x.double() for x in xs] for xs in (inputs.primals, inputs.tangents))

    def run(step: float) -> torch.Tensor:
        moved = [p + step * t for p, t in zip(primals, tangents, strict=True)]
        return torch.nn.functional.scaled_dot_product_attention(*moved, is_causal=case.causal)

    slope = (run(1e-5) - run(-1e-5)) / 2e-5
    exact = suite.compared(case, (run(0.0), slope))
    torch.testing.assert_close(suite.expected(case, inputs), exact, rtol=1e-6, atol=1e-7)


def scaled(provider: Provider, at: Any = ...) -> Provider:
    """The provider with a tangent that is 1 % too large, everywhere or at one place."""

    def answer(*arguments: Any) -> Any:
        output, tangent = provider.answer(*arguments)
        factor = torch.ones_like(tangent)
        factor[at] = 1.01
        return output, tangent * factor

    return replace(provider, answer=answer)


@pytest.mark.parametrize("at", [(0, 0), (2, 3)])
@pytest.mark.parametrize("group", [FORWARD, BACKWARD, SECOND])
def test_a_fault_in_one_head_is_seen(group: str, at: tuple[int, int]) -> None:
    suite, case = bench_attention.SUITE, Case(group, "attention", (3, 4, 10, 8), "fp32")
    with pytest.raises(NotTimedError, match=r"allowed 1\.0e-05") as found:
        Prepared(suite, case, CPU).checked_call(scaled(suite.providers(case)[0], at))
    assert found.value.status == "wrong"


@pytest.mark.parametrize("op", ["gelu", "gelu-step"])
def test_a_fault_in_a_layer_is_seen(op: str) -> None:
    suite, case = bench_layers.SUITE, Case("elementwise", op, (7, 48), "fp32")
    with pytest.raises(NotTimedError, match="allowed"):
        Prepared(suite, case, CPU).checked_call(scaled(suite.providers(case)[0]))


@pytest.mark.parametrize("group", ["model-forward", "train-step"])
@pytest.mark.parametrize("name", ["taft-all", "taft-1", "taft-1-cached"])
def test_a_fault_in_a_model_is_seen(group: str, name: str) -> None:
    """In a step the gradients are right, but taken at a wrong point."""
    suite, case = bench_models.SUITE, Case(group, "test_vit", (2,), "fp32")
    (provider,) = (one for one in suite.providers(case) if one.name == name)

    def answer(operands: Any) -> Any:
        subject = provider.answer(operands)

        def run() -> Any:
            f, tangent = subject.run()
            return f, 1.05 * tangent

        return replace(subject, run=run)

    with pytest.raises(NotTimedError, match="allowed"):
        Prepared(suite, case, CPU).checked_call(replace(provider, answer=answer))


@pytest.mark.parametrize("extent", ["home", "default", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("module", [bench_attention, bench_layers, bench_models])
def test_cases_are_different_and_have_benchmarks(module, device, extent) -> None:
    cases = module.SUITE.cases(torch.device(device), extent)
    assert len(set(cases)) == len(cases)
    tests = {name.removeprefix("test_").replace("_", "-") for name in vars(module)}
    assert {case.group for case in cases} <= tests


@pytest.mark.parametrize(
    ("suite", "case"), CASES[::3], ids=[f"{c.group} {c}" for _, c in CASES[::3]]
)
def test_a_tangent_costs_more_than_none(suite: Suite, case: Case) -> None:
    costs = {one.name: suite.cost(case, one) for one in suite.providers(case)}
    ours = suite.providers(case)[0].name
    plain = next(name for name in ("plain", "sdpa-flash", "finetune") if name in costs)
    assert costs[ours].flops > costs[plain].flops > 0 or "backward" in case.group
    assert costs[ours].bytes >= costs[plain].bytes > 0
    if case.op == "test_vit":
        for of in ("flops", "bytes"):
            parts = ("taft-all", "taft-1", "taft-1-cached")
            whole, last, tail = (getattr(costs[name], of) for name in parts)
            assert whole > last > tail > 0
        times = (5, 3) if case.group == "train-step" else (3, 1)
        assert costs["taft-all"].flops / costs["finetune"].flops == pytest.approx(
            times[0] / times[1]
        )
        assert costs["taft-all"] == costs["torch-jvp"] == costs["taft-all-compiled"]


@pytest.mark.parametrize("name", bench_steps.WAYS)
def test_what_an_epoch_trains(name: str) -> None:
    """The parameters of the ways to train, and images or features of as many samples."""
    case = Case("epoch", "test_vit", (6, 2), "fp32")
    model, data, trained = bench_steps.trainee(name, case, CPU)
    ends = {key.split(".")[0] for key in trained}
    assert ends == ({"blocks", "norm", "head"} if "-1" in name else ends | {"patch_embed"})
    assert len(data.dataset) == 6
    assert (data.dataset[0][0].dim() == 3) == (name != "taft-1-cached")
    assert {id(one) for one in trained.values()} <= {id(one) for one in model.parameters()}


# --- what the check does, on a suite of two numbers ----------------------------------------------

CASE = Case("doubles", "double", (4,), "fp32")


class Doubling(Suite):
    """The right answer is twice its input, and the input's square."""

    def inputs(self, case, device, seed):
        return torch.arange(1.0, 5.0)

    def expected(self, case, inputs):
        return 2 * inputs.double(), inputs.double().square()

    def prepare(self, provider, case, inputs):
        return lambda: provider.answer(inputs)

    def bound(self, case):
        return 1e-6

    def cost(self, case, provider):
        return Cost(8.0, 32.0)


def check(answer, **options) -> float | None:
    suite = Doubling()
    suite.provider("one", **options)(answer)
    prepared = Prepared(suite, CASE, CPU)
    prepared.checked_call(suite.providers(CASE)[0])
    return prepared.errors["one"]


def raises(problem: Exception):
    def answer(x):
        raise problem

    return answer


@pytest.mark.parametrize(
    ("answer", "options", "status", "note"),
    [
        (lambda x: (2 * x, x * x + 1e-4), {}, "wrong", "error 1.1e-05, allowed 1.0e-06"),
        (lambda x: (2 * x, x * float("nan")), {}, "wrong", "error inf"),
        (lambda x: (2 * x, x * float("inf")), {}, "wrong", "error inf"),
        (lambda x: (2 * x[:3], x * x), {}, "failed", "shape \\(3,\\), expected \\(4,\\)"),
        (raises(RuntimeError("no kernel\n for it")), {}, "failed", "RuntimeError: no kernel for"),
        (raises(torch.OutOfMemoryError("tried 100 GB")), {}, "failed", "^out of memory$"),
        (raises(ValueError()), {"missing": lambda c, d: "not today"}, "absent", "^not today$"),
    ],
)
def test_who_is_not_timed(answer, options, status, note) -> None:
    with pytest.raises(NotTimedError, match=note) as found:
        check(answer, **options)
    assert found.value.status == status


def test_approximations_may_err_more() -> None:
    assert check(lambda x: (2 * x, x * x * 1.0001), question="finite-differences") == pytest.approx(
        1e-4, rel=0.1
    )


def test_without_memory_for_the_exact_answer_nothing_is_timed(monkeypatch) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("tried 100 GB")

    monkeypatch.setattr(Doubling, "expected", full)
    with pytest.raises(NotTimedError, match="not checked"):
        check(lambda x: (2 * x, x * x))


def test_a_provider_may_compute_less() -> None:
    two = torch.ones(3), torch.ones(3)
    assert relative_error(two[:1], two) == 0.0
    assert relative_error((), two) is None


def test_a_name_is_registered_once() -> None:
    suite = Doubling()
    suite.provider("one", groups=("other",))(abs)
    with pytest.raises(ValueError, match="'one' is registered twice"):
        suite.provider("one")(abs)
    assert suite.providers(CASE) == []
