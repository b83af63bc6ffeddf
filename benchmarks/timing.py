"""Wall times of rival callables, taken in turns, so that a machine's mood falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of `rounds` calls."""

    median: float
    lower: float
    upper: float
    rounds: int


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Timing]:
    """Times every case once per round, in order, after `warmup` untimed rounds.

    Args:
        cases: name to callable; what a callable returns is dropped before the next one runs.
        rounds: timed calls of each case, at least 2.
        warmup: untimed rounds before them.
        device: where the callables compute; a CUDA device is synchronized around each call.
        progress: shows a bar on stderr.

    Returns:
        The timing of each case, in the order given.

    Raises:
        ValueError: fewer than 2 rounds, which have no quartiles.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: at least 2 are needed for quartiles")
    cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in tqdm(range(-warmup, rounds), desc=" / ".join(cases), disable=not progress):
        for name, call in cases.items():
            if cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(taken) for name, taken in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))
