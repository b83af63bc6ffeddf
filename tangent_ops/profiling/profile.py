"""Runs our model and its rivals under the profiler, with interleaved steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from tangent_ops.profiling.environment import environment
from tangent_ops.profiling.events import (
    Spent,
    Total,
    by_family,
    cpu_time,
    cuda_time,
    most_expensive,
)
from tangent_ops.profiling.memory import peak_bytes
from tangent_ops.profiling.sides import MEANING, OURS, Settings, attention_marked, build

Notify = Callable[[str], None]


@dataclass
class Side:
    """The measurements of one model. If ``error`` is set, they are empty.

    Attributes:
        name: :data:`OURS` or a rival.
        meaning: the name in words.
        families: milliseconds of every family in the profiled step with the median sum: CPU time
            on a CPU, device time on CUDA.
        wall: milliseconds of each step without the profiler.
        peak: bytes at the peak of a step, above what was allocated before it.
        peak_absolute: bytes at the peak, the model and images included; None on a CPU.
        top: the operations or kernels that take longest in that step.
        trace: the file with its Chrome trace, in the output folder.
        error: why there is no result.
    """

    name: str
    meaning: str
    families: dict[str, float] = field(default_factory=dict)
    wall: list[float] = field(default_factory=list)
    peak: int = 0
    peak_absolute: int | None = None
    top: list[Total] = field(default_factory=list)
    trace: str = ""
    error: str | None = None

    @property
    def total(self) -> float:
        """Milliseconds of all families."""
        return sum(self.families.values())

    @property
    def wall_median(self) -> float:
        """Milliseconds of a step without the profiler."""
        return median(self.wall)


@dataclass
class Comparison:
    """Ours and its rivals, in this order."""

    settings: Settings
    environment: dict[str, str]
    sides: list[Side]

    @property
    def ours(self) -> Side:
        return self.sides[0]


def units(settings: Settings) -> int:
    """How often :func:`compare` calls ``notify``, if nothing fails."""
    return (1 + len(settings.against)) * (2 + settings.warmup + 2 * settings.steps)


def compare(settings: Settings, notify: Notify = lambda stage: None) -> Comparison:
    """Measure ours and every rival, a step of each in turn; write a Chrome trace of each.

    The steps are interleaved, so that drift affects all sides equally. If a side fails, for example
    for lack of memory, this is recorded and the others continue.

    Args:
        settings: what to run; traces go to ``settings.out``, which is created.
        notify: called with the next stage's description.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    about = environment(settings.device)
    runs = [_Run(name, settings, notify) for name in (OURS, *settings.against)]
    for run in runs:
        run.attempt(run.prepare)
    for _ in range(settings.steps):
        for run in runs:
            run.attempt(run.time)
    for run in runs:
        run.attempt(run.measure_memory)
    for _ in range(settings.steps):
        for run in runs:
            run.attempt(run.profile)
    for run in runs:
        run.attempt(run.conclude)
    return Comparison(settings, about, [run.side for run in runs])


class _Run:
    """The measurement of one side, in stages."""

    def __init__(self, name: str, settings: Settings, notify: Notify):
        self.side = Side(name, MEANING[name])
        self._settings = settings
        self._device = torch.device(settings.device)
        self._cuda = self._device.type == "cuda"
        self._notify = notify
        self._step: Callable[[], Any] | None = None
        self._resident = 0  # bytes of the model and images
        self._profiles: list[tuple[float, list[Spent], profiler]] = []

    def attempt(self, stage: Callable[[], None]) -> None:
        """Run a stage, unless an earlier one failed; record it if this one does."""
        if self.side.error is not None:
            return
        try:
            stage()
        except Exception as error:  # whatever a rival raises is its result
            self.side = Side(self.side.name, self.side.meaning, error=_why(error))
        if self.side.error is not None:  # outside of except: its traceback held tensors
            self._step, self._profiles = None, []
            gc.collect()
            if self._cuda:
                torch.cuda.empty_cache()

    def prepare(self) -> None:
        self._tell("building")
        before = self._allocated()
        self._step = build(self.side.name, self._settings)
        self._resident = self._allocated() - before
        for _ in range(self._settings.warmup):
            self._tell("warming up")
            self._run()

    def time(self) -> None:
        self._tell("timing")
        start = time.perf_counter()
        self._run()
        self.side.wall.append(1e3 * (time.perf_counter() - start))

    def measure_memory(self) -> None:
        self._tell("measuring memory")
        self.side.peak = peak_bytes(self._run, self._device)
        self.side.peak_absolute = self._resident + self.side.peak if self._cuda else None

    def profile(self) -> None:
        self._tell("profiling")
        self._run()  # warm-up: other sides took this one's memory, so its pages fault in again
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        # Without acc_events torch 2.11 warns of profiler cycles, which are not used here.
        with attention_marked(), profiler(activities=activities, acc_events=True) as record:
            self._run()
        events: Any = record.events()
        spent = cuda_time(events) if self._cuda else cpu_time(events)
        self._profiles.append((sum(one.microseconds for one in spent), spent, record))

    def conclude(self) -> None:
        """Keep the step with the median sum (of an even number, the lower one)."""
        in_order = sorted(self._profiles, key=lambda entry: entry[0])
        _, spent, record = in_order[(len(in_order) - 1) // 2]
        self.side.families = by_family(spent)
        self.side.top = most_expensive(spent)
        self.side.trace = f"{self.side.name}.json.gz"
        record.export_chrome_trace(str(self._settings.out / self.side.trace))

    def _run(self) -> None:
        assert self._step is not None
        self._step()
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._cuda else 0

    def _tell(self, stage: str) -> None:
        self._notify(f"{self.side.name}: {stage}")


def _why(error: Exception) -> str:
    text = str(error)
    # The CPU's allocator raises a RuntimeError.
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "out of memory"
    lines: Iterable[str] = text.strip().splitlines()
    return ": ".join([type(error).__name__, *list(lines)[:1]])
