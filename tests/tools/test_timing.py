"""The time of calls by CUDA graphs: on a made-up GPU, and on a real one."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tangent_kernels import timing
from tangent_kernels.timing import capture, capture_many, medians

from benchmarks.case import Case, Cost, Provider
from benchmarks.measure import Contender
from tangent_ops import scaled_dot_product_attention


class MadeUpGpu:
    """Runs what is replayed at once; its clock (seconds) stands still meanwhile for the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slower, self.replays = 0.0, 1.0, 0
        self.capturing: list[float] | None = None
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.kernels: list[float] = []

            def replay(self) -> None:
                gpu.replays += 1
                gpu.now += gpu.slower * sum(self.kernels)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        @contextlib.contextmanager
        def graph(into: Graph, stream, capture_error_mode: str):
            assert stream.cuda_stream != 0, "CUDA does not capture its default stream"
            self.capturing = into.kernels
            yield
            self.capturing = None

        def streams(handle: int):
            return SimpleNamespace(cuda_stream=handle, wait_stream=lambda other: None)

        fakes = {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "synchronize": lambda: None,
            "Stream": lambda: streams(7),
            "current_stream": lambda: streams(0),
            "stream": lambda stream: contextlib.nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def kernel(self, seconds: float, name: str = ""):
        """A call that launches a kernel of so many seconds, after slow Python."""

        def call() -> str:
            time.sleep(1e-4)
            if self.capturing is not None:
                self.capturing.append(seconds)
            return name

        return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    return MadeUpGpu(monkeypatch)


@pytest.mark.parametrize("seconds", [3e-6, 5e-5, 0.1])
def test_the_time_of_the_kernels_alone(gpu: MadeUpGpu, seconds: float) -> None:
    captured = capture_many([gpu.kernel(seconds)])
    assert medians([captured]) == [pytest.approx(seconds)]
    assert captured.count == max(1, min(timing.MOST, -(-timing.SECONDS // seconds)))


def test_operands_take_turns_and_results_are_kept_for_as_long(gpu: MadeUpGpu) -> None:
    calls = [gpu.kernel(1e-6, "a"), gpu.kernel(3e-6, "b")]
    captured = capture(calls, 5)
    assert captured.graph.kernels == [1e-6, 3e-6, 1e-6, 3e-6, 1e-6]
    assert (captured.count, captured.results) == (5, ("b", "a"))
    assert medians([captured]) == [pytest.approx(9e-6 / 5)]
    assert medians([capture(calls)]) == [pytest.approx(2e-6)]


def test_contenders_take_turns(gpu: MadeUpGpu) -> None:
    """A GPU that becomes ten times slower half way does so for both; a slow round is no median."""
    graphs = [capture([gpu.kernel(seconds)]) for seconds in (1e-3, 2e-3)]
    rounds = iter(range(100))
    synchronize = torch.cuda.synchronize

    def a_round_is_over() -> None:
        gpu.slower = 10.0 if next(rounds) % 2 else 1.0
        synchronize()

    torch.cuda.synchronize = a_round_is_over
    fast, slow = medians(graphs, rounds=11)
    assert (fast, slow) == (pytest.approx(1e-3), pytest.approx(2e-3))


def test_what_fails_outside_the_capture_fails(gpu: MadeUpGpu) -> None:
    def fails() -> None:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError, match="out of resource"):
        capture_many([fails])


class Rounds:
    """pytest-benchmark's fixture, with the clock of a made-up GPU."""

    def __init__(self, gpu: MadeUpGpu) -> None:
        self.gpu, self.extra_info, self.seconds = gpu, {}, []

    def pedantic(self, call, rounds: int, iterations: int, warmup_rounds: int) -> None:
        for turn in range(-warmup_rounds, rounds):
            start = self.gpu.now
            for _ in range(iterations):
                call()
            if turn >= 0:
                self.seconds.append((self.gpu.now - start) / iterations)


@pytest.mark.parametrize("group", ["attention-backward", "train-step"])
def test_the_suite_times_single_ops_without_the_host(gpu: MadeUpGpu, group: str) -> None:
    """A round is one replay of a graph, which holds as many calls as the round counts."""
    case, host = Case(group, "op", (4,), "bf16"), 1e-3
    prepared: Any = SimpleNamespace(
        case=case, device=torch.device("cuda"), input_bytes=0, errors={"ours": 0.0},
        estimates={"ours": host}, suite=SimpleNamespace(cost=lambda case, one: Cost(1.0, 1.0)),
    )  # fmt: skip
    rounds, single = Rounds(gpu), group != "train-step"
    Contender(prepared, Provider("ours", abs), gpu.kernel(7e-5), 3, 1).time(rounds)
    assert rounds.extra_info.get("called") == (host if single else None)
    assert len(rounds.seconds) > 30
    # What is not captured runs when it is called, which moves the clock of this GPU by nothing.
    assert rounds.seconds == [pytest.approx(7e-5 if single else 0.0)] * len(rounds.seconds)


@pytest.mark.gpu
def test_python_does_not_count() -> None:
    x = torch.randn(2**20, device="cuda")

    def slow_host() -> torch.Tensor:
        time.sleep(2e-3)
        return x + 1

    plain, slow = medians([capture([lambda: x + 1], 50), capture([slow_host], 50)])
    assert 0 < plain < 1e-3
    assert 0 < slow < 1e-3


@pytest.mark.gpu
def test_a_backward_pass_is_captured() -> None:
    """On the stream of its forward pass, as the benchmarks run it; it is linear in `grad`."""
    with torch.cuda.stream(torch.cuda.Stream()):
        q, k, v = (torch.randn(1, 2, 64, 32, device="cuda", requires_grad=True) for _ in "qkv")
        output = scaled_dot_product_attention(q, k, v)
        grad = torch.randn_like(output)

        def backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(output, (q, k, v), grad, retain_graph=True)

        expected, captured = backward(), capture([backward])
        grad.mul_(2)
        captured.replay()
    torch.cuda.synchronize()
    for found, once in zip(captured.results[0], expected, strict=True):
        torch.testing.assert_close(found, 2 * once)
