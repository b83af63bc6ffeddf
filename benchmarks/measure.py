"""How a provider is measured: checked against the exact answer first, timed second."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tangent_kernels import timing
from tangent_kernels.timing import Captured
from torch._C._functorch import is_functorch_wrapped_tensor

from benchmarks.case import Call, Case, Outputs, Provider, Suite, clock_of
from tangent_ops.profiling.memory import peak_bytes, saved_bytes

SECONDS = 0.3  # for the timed rounds of a provider
# Groups of single ops, whose Python and launches take longer on CUDA than their kernels: replays of
# a graph are timed.
SINGLE = (
    "attention-forward",
    "attention-backward",
    "attention-second-order",
    "elementwise",
    "linear",
)
MOST_OPERANDS = 16
SHORT = 0.2  # seconds: calls below are warmed up again in every turn


class NotTimedError(Exception):
    """A provider gets no time; ``status`` is "absent", "wrong" or "failed"."""

    def __init__(self, status: str, note: str):
        super().__init__(note)
        self.status = status


class Prepared:
    """A case with its operands and its exact answer."""

    def __init__(self, suite: Suite, case: Case, device: torch.device):
        self.suite, self.case, self.device = suite, case, device
        before = torch.cuda.memory_allocated()
        self.inputs = suite.inputs(case, device, 0)
        self.input_bytes = torch.cuda.memory_allocated() - before  # 0 on the CPU
        self.errors: dict[str, float | None] = {}  # of the providers that were checked
        self.estimates: dict[str, float] = {}  # seconds of a call
        self.exact: Outputs | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            self.exact = suite.expected(case, self.inputs)
        free_memory()  # the exact answer of a large model, in float64, took gigabytes

    def checked_call(self, provider: Provider) -> Call:
        """The provider's call; it is compared with the exact answer at the first time.

        Raises:
            NotTimedError: it cannot run here, raises, or its answer is wrong.
        """
        if reason := provider.missing(self.case, self.device):
            raise NotTimedError("absent", reason)
        if self.exact is None:
            raise NotTimedError("failed", "not checked: no memory for the exact answer")
        try:
            call = self.suite.prepare(provider, self.case, self.inputs)
            if provider.name in self.errors:
                return call
            error = relative_error(self.suite.compared(self.case, call()), self.exact)
        except Exception as problem:  # a rival's own: the run goes on
            free_memory()
            full = isinstance(problem, torch.OutOfMemoryError)
            note = "out of memory" if full else f"{type(problem).__name__}: {problem}"
            raise NotTimedError("failed", textwrap.shorten(note, 160)) from problem
        allowed = self.suite.allowed(self.case, provider)
        if error is not None and error > allowed:
            raise NotTimedError("wrong", f"error {error:.1e}, allowed {allowed:.1e}")
        self.errors[provider.name] = error
        return call


def relative_error(found: Outputs, exact: Outputs) -> float | None:
    """The largest ‖found - exact‖ / ‖exact‖ of the pairs; None if nothing is compared.

    Raises:
        ValueError: a pair differs in shape.
    """
    errors = []
    for one, true in zip(found, exact, strict=False):  # a provider may compute less
        if one.shape != true.shape:
            raise ValueError(f"shape {tuple(one.shape)}, expected {tuple(true.shape)}")
        true = true.double()
        error = float((one.detach().double() - true).norm() / true.norm())
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors, default=None)


@dataclass
class Contender:
    """A provider that was found right, ready to be timed; the ``provider`` fixture."""

    prepared: Prepared
    provider: Provider
    call: Call  # on the case's operands
    turns: int  # how often the providers of the case take turns
    turn: int  # from 0; memory is measured in the first

    def time(self, benchmark: Any) -> None:
        """Times the call by pytest-benchmark, on operands that take turns."""
        prepared, name = self.prepared, self.provider.name
        case, device, clock = prepared.case, prepared.device, clock_of(prepared.device)
        calls: list[Callable[[], object]] = [self.call, *self._other_operands()]
        estimate = prepared.estimates.get(name) or _estimate(calls, clock)
        prepared.estimates[name] = estimate
        # A timer that waits for the device is read twice a round: rounds of a millisecond hide it.
        iterations = max(1, round(1e-3 / estimate)) if device.type == "cuda" else 1
        if device.type == "cuda" and case.group in SINGLE and (graph := _graph(calls)):
            benchmark.extra_info["called"] = estimate  # with Python and launches
            (estimate,), iterations = timing.medians([graph], rounds=3), graph.count
            calls = [graph.replay, *[_nothing] * (graph.count - 1)]  # a replay is a whole round
        info = {"case": asdict(case), "provider": name, "error": prepared.errors[name]}
        benchmark.extra_info.update(info, **asdict(prepared.suite.cost(case, self.provider)))
        if self.turn == 0 and not self.provider.graphed:  # a replay allocates nothing
            benchmark.extra_info.update(self._memory())
        following = itertools.cycle(calls)
        fewest = max(2, math.ceil(5 / self.turns))
        benchmark.pedantic(
            lambda: _drop(next(following)()),
            rounds=min(100, max(fewest, int(SECONDS / self.turns / estimate / iterations))),
            iterations=iterations,
            warmup_rounds=1 if estimate < SHORT else 0,
        )

    def _other_operands(self) -> Iterator[Call]:
        """Calls on other operands, as many as it takes to leave none in a GPU's cache."""
        prepared = self.prepared
        if not prepared.input_bytes:  # on the CPU; or a model that was there: larger than a cache
            return
        cache = torch.cuda.get_device_properties(prepared.device).L2_cache_size
        for seed in range(1, min(MOST_OPERANDS, -(-2 * cache // max(1, prepared.input_bytes)))):
            try:
                more = prepared.suite.inputs(prepared.case, prepared.device, seed)
                call = prepared.suite.prepare(self.provider, prepared.case, more)
                call()
            except torch.OutOfMemoryError:
                free_memory()
                return
            yield call

    def _memory(self) -> dict[str, int]:
        """Bytes at the peak of a call, and those that autograd saves for the backward pass.

        Parameters and what else is there anyway is not counted. Empty without memory to measure it.
        """
        gc.collect()
        # What the compiler leaves of its tracing, and other layouts (oneDNN's), have no storage.
        there = [
            x
            for x in gc.get_objects()
            if type(x) in (torch.Tensor, torch.nn.Parameter)
            if not is_functorch_wrapped_tensor(x) and x.layout is torch.strided
        ]
        try:
            saved = saved_bytes(self.call, exclude=there)
            del there
            peak = peak_bytes(self.call, self.prepared.device)
        except torch.OutOfMemoryError:
            free_memory()
            return {}
        return {"peak_bytes": peak, "saved_bytes": saved}


def _estimate(calls: Sequence[Callable[[], object]], clock: Callable[[], float]) -> float:
    """Seconds of a call: the median of a few, of one if it is long."""
    found = []
    for call in itertools.islice(itertools.cycle(calls), 5):
        start = clock()
        call()
        found.append(clock() - start)
        if found[-1] > SHORT:
            break
    return max(1e-9, statistics.median(found))


def _drop(result: object) -> None:
    """Outputs are freed within the timed call, as they are in a training loop."""


def _nothing() -> None:
    pass


def _graph(calls: Sequence[Callable[[], object]]) -> Captured | None:
    """A CUDA graph of many calls; None where they cannot be captured, or memory is too small."""
    try:
        return timing.capture_many(calls)
    except RuntimeError:
        torch.cuda.empty_cache()
        return None


def free_memory() -> None:
    """Frees what calls have left behind: cycles, compiled code and all it holds, caches."""
    gc.collect()
    torch.compiler.reset()  # or its limit of recompilations would end in eager code
    # glibc keeps what is freed (`keep_memory`), until it is told to return it.
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    torch.cuda.empty_cache()
