"""The time of calls on a GPU without the host's: replays of CUDA graphs, each of many calls."""

from __future__ import annotations

import collections
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], object]

SECONDS = 2e-3  # that a graph takes at least: to launch it takes the host about 10 µs
MOST = 500  # calls in a graph


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of calls, and what the last of them returned: a replay writes to it."""

    graph: Any  # torch.cuda.CUDAGraph
    count: int  # of the calls
    results: Sequence[Any]  # of as many calls as had different operands

    def replay(self) -> None:
        self.graph.replay()


def capture(calls: Sequence[Work], count: int = 0) -> Captured:
    """A graph of ``count`` calls in turn, by default each once; it runs them before.

    Results are kept until each call has come again: so neither operands nor results stay in the L2
    cache where ``calls`` have enough different operands. The capture is on the current stream, or
    on a new one if this is the default stream, which CUDA cannot capture. A backward pass is
    captured only on the stream of its forward pass.

    Raises:
        RuntimeError: a call fails, or cannot be captured because it waits for the GPU.
    """
    stream = torch.cuda.current_stream()
    if stream.cuda_stream == 0:  # the default one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and workspaces are no part of a graph
        for call in calls:
            call()
    graph, count = torch.cuda.CUDAGraph(), count or len(calls)
    results = collections.deque(maxlen=len(calls))
    try:
        # Other threads of the process, as those that load data, may use CUDA meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for call in itertools.islice(itertools.cycle(calls), count):
                results.append(call())
    finally:
        torch.cuda.synchronize()
    return Captured(graph, count, tuple(results))


def capture_many(calls: Sequence[Work]) -> Captured:
    """A graph of the calls in turn, as often as SECONDS take: the time of its launch is lost in it.

    Raises:
        RuntimeError: see :func:`capture`.
    """
    once = capture(calls)
    (seconds,) = medians([once], rounds=3)
    count = min(MOST, math.ceil(SECONDS / max(seconds, 1e-9)))
    return capture(calls, count) if count > len(calls) else once


def medians(contenders: Sequence[Captured], rounds: int = 25) -> list[float]:
    """The median seconds of a call of each; they take turns, so that drift affects all equally."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for one in contenders[-1:]:
            one.replay()  # while it runs, the host gets ahead of the GPU
        spans = []
        for one in contenders:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            one.replay()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        for found, one, (start, end) in zip(times, contenders, spans, strict=True):
            found.append(start.elapsed_time(end) / 1e3 / one.count)
    return [statistics.median(found) for found in times]
