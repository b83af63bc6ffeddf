"""Computes the time and the family of each operation or kernel from the profiler's events."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from tangent_ops.profiling.families import FAMILIES, family


@dataclass(frozen=True)
class Spent:
    """Time of one run of an operation, without the operations it called, or of a kernel.

    Attributes:
        name: of the operation or kernel.
        family: one of :data:`tangent_ops.profiling.families.FAMILIES`.
        microseconds: of the CPU for an operation, of the device for a kernel.
    """

    name: str
    family: str
    microseconds: float


@dataclass(frozen=True)
class Total:
    """All runs of one operation or kernel.

    Attributes:
        name: of the operation or kernel.
        family: one of :data:`tangent_ops.profiling.families.FAMILIES`.
        milliseconds: in all.
        calls: number of runs.
    """

    name: str
    family: str
    milliseconds: float
    calls: int


def cpu_time(events: Iterable[Any]) -> list[Spent]:
    """Self CPU time of every operation: time in nested operations counts for the innermost.

    Args:
        events: ``torch.profiler.profile(...).events()``.
    """
    lineages = _Lineages(_on_cpu(events))
    return [
        Spent(event.name, family(lineages.of(event)), event.self_cpu_time_total)
        for event in lineages.events
    ]


def cuda_time(events: Iterable[Any]) -> list[Spent]:
    """Device time of every kernel, copy and fill.

    A kernel's family follows from the operations that launched it, where the profiler knows
    them, and from its name.

    Args:
        events: ``torch.profiler.profile(...).events()``.
    """
    events = list(events)
    lineages = _Lineages(_on_cpu(events))
    spent = []
    linked: Counter[tuple[str, int, float]] = Counter()
    for event in lineages.events:
        for kernel in event.kernels:
            found = family(lineages.of(event), kernel.name)
            spent.append(Spent(kernel.name, found, kernel.duration))
            linked[kernel.name, kernel.device, kernel.duration] += 1
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        span = event.time_range.end - event.time_range.start
        key = (event.name, event.device_index, span)
        if linked[key] > 0:
            linked[key] -= 1
        else:
            spent.append(Spent(event.name, family((), event.name), span))
    return spent


def by_family(spent: Iterable[Spent]) -> dict[str, float]:
    """Milliseconds of every family, zeros included, in the order of FAMILIES."""
    sums = dict.fromkeys(FAMILIES, 0.0)
    for one in spent:
        sums[one.family] += one.microseconds / 1e3
    return sums


def most_expensive(spent: Iterable[Spent], count: int = 10) -> list[Total]:
    """The operations or kernels that take longest, one entry for each name and family."""
    groups: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for one in spent:
        groups[one.name, one.family].append(one.microseconds)
    totals = [
        Total(name, kind, sum(times) / 1e3, len(times)) for (name, kind), times in groups.items()
    ]
    return sorted(totals, key=lambda total: -total.milliseconds)[:count]


def _on_cpu(events: Iterable[Any]) -> list[Any]:
    found = [event for event in events if event.device_type == DeviceType.CPU]
    return sorted(found, key=lambda event: event.time_range.start)


class _Lineages:
    """The names of the operations in which each operation is nested.

    An autograd node carries the sequence number that its forward operation had. Operations show
    the number that the next node will get, so a node's maker is the last to start with its number.
    """

    def __init__(self, events: list[Any]):
        self.events = events  # in order of their start
        self._known: dict[int, tuple[str, ...]] = {}
        self._makers: dict[tuple[int, int], Any] = {}
        backward: set[int] = set()
        for event in events:
            if _is_node(event) or id(event.cpu_parent) in backward:
                backward.add(id(event))
            elif event.sequence_nr >= 0:
                self._makers[event.thread, event.sequence_nr] = event

    def of(self, event: Any) -> tuple[str, ...]:
        """Names from the outermost operation to ``event``; a backward pass follows its forward."""
        if id(event) not in self._known:
            above: tuple[str, ...] = ()
            parent = event.cpu_parent
            if parent is not None:
                # Beside the node itself, the engine adds up gradients, perhaps of other operations.
                if not _is_node(parent) or parent.name.endswith(f": {event.name}"):
                    above = self.of(parent)
            elif _is_node(event):
                maker = self._makers.get((event.fwd_thread, event.sequence_nr))
                above = () if maker is None else self.of(maker)
            self._known[id(event)] = (*above, event.name)
        return self._known[id(event)]


def _is_node(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")
