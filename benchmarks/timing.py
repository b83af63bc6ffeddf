"""Times of rival callables, taken in turns, so that a machine's mood falls on all alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of `rounds` calls."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of single calls, two at least.

        Raises:
            ValueError: fewer than 2, which have no quartiles.
        """
        if len(seconds) < 2:
            raise ValueError(f"{len(seconds)} calls have no quartiles: time at least 2")
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


def interleave(
    rivals: Mapping[str, Calls],
    *,
    device: torch.device,
    budget: float,
    rounds: tuple[int, int] = (5, 100),
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Times every rival once per round, in order, after `warmup` untimed rounds.

    Args:
        rivals: name to calls that do the same on other operands: they take turns, so that on a
            GPU the operands are not found in its cache. What a call returns is dropped before
            the next one runs.
        device: where they compute. On CUDA a time is that between two events around the call on
            the device's own clock; where the host is slower than the device, that is the host's.
        budget: seconds to spend on the timed rounds, all rivals together; a round that has begun
            is finished.
        rounds: at least and at most.
        warmup: untimed rounds before them.

    Returns:
        Seconds of each call, by rival.
    """
    turns = {name: itertools.cycle(calls) for name, calls in rivals.items()}
    time_once = _on_cuda if device.type == "cuda" else _on_cpu
    for _ in range(warmup):
        for calls in turns.values():
            time_once(next(calls))
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    least, most = rounds
    end = time.perf_counter() + budget
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name, calls in turns.items():
            seconds[name].append(time_once(next(calls)))
    return seconds


def cuda_graph(call: Callable[[], object]) -> Callable[[], object] | None:
    """Replays of what `call` launches, without its Python; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initializations are no part of a graph
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
    except RuntimeError:
        return None
    finally:
        torch.cuda.synchronize()

    def replay() -> object:
        graph.replay()
        return kept  # the graph writes to it

    return replay


def _on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_cuda(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
