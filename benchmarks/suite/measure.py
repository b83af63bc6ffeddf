"""How a case is measured: every provider checked, then all that are right timed in turns."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.suite.case import Call, Case, Outputs, Provider, Workload
from benchmarks.suite.registry import workload_of
from benchmarks.suite.row import Row, Status
from benchmarks.timing import Timing, cuda_graph, interleave

# Below this a call is at the mercy of Python and the launches: the device's own time is asked, too.
GRAPH_BELOW = 1e-3  # seconds
# A backward pass runs on the stream of its forward pass, which no capture may touch.
WITHOUT_BACKWARD = ("attention-forward", "elementwise", "linear", "model-forward")
MOST_OPERANDS = 16


@dataclass(frozen=True)
class Measured:
    """A row, and the seconds of the single calls that its timing sums up."""

    row: Row
    seconds: Sequence[float] = ()


def measure(
    case: Case, names: Sequence[str], device: torch.device, budget: float
) -> dict[str, Measured]:
    """Checks the named providers of a case against the exact answer, and times the right ones.

    Args:
        case: what is asked.
        names: of its providers.
        device: where.
        budget: seconds for the timed rounds, all providers together.

    Returns:
        A measured row for every name, in the workload's order; memory is not in it.
    """
    workload = workload_of(case)
    inputs = workload.inputs(case, device, 0)
    providers = [one for one in workload.providers(case) if one.name in names]
    found: dict[str, Measured] = {}
    calls: dict[str, list[Call]] = {}
    try:
        exact = workload.expected(case, inputs)
    except torch.OutOfMemoryError:
        forget()
        note = "not checked: the exact answer does not fit into memory"
        return {one.name: Measured(Row.of(case, one, "failed", note)) for one in providers}
    for provider in providers:
        row, call = _check(workload, case, provider, inputs, exact, device)
        found[provider.name] = Measured(row)
        if call is not None:
            calls[provider.name] = [call]
    del exact
    _trim()
    if calls:
        for name, more in _other_operands(workload, case, calls, inputs, device):
            calls[name].append(more)
        _time(calls, found, device, budget)
        if device.type == "cuda" and _can_be_captured(case):
            _time_graphs(calls, found, device, budget / 2)
    del calls, inputs
    forget()
    return found


def relative_error(found: Outputs, exact: Outputs) -> float | None:
    """The largest ‖found - exact‖ / ‖exact‖ of the pairs; None if nothing is compared.

    Raises:
        ValueError: a pair differs in shape.
    """
    errors = []
    for one, true in zip(found, exact, strict=False):  # a yardstick computes less
        if one.shape != true.shape:
            raise ValueError(f"shape {tuple(one.shape)}, expected {tuple(true.shape)}")
        true = true.double()
        error = float((one.detach().double() - true).norm() / true.norm())
        errors.append(float("inf") if error != error else error)
    return max(errors, default=None)


def _check(
    workload: Workload,
    case: Case,
    provider: Provider,
    inputs: Any,
    exact: Outputs,
    device: torch.device,
) -> tuple[Row, Call | None]:
    """The provider's row so far, and its call if that is worth timing."""

    def row(status: Status, note: str = "", error: float | None = None) -> Row:
        return Row.of(case, provider, status, note, error=error)

    if reason := provider.why_not(case, device):
        return row("absent", reason), None
    try:
        call = provider.prepare(case, inputs)
        error = relative_error(workload.compared(case, call()), exact)
    except torch.OutOfMemoryError:
        forget()
        return row("failed", "out of memory"), None
    except Exception as problem:  # a rival's own: to be reported, not to end the run
        forget()
        return row("failed", _one_line(problem)), None
    bound = workload.bound(case) * provider.slack
    if error is not None and error > bound:
        note = f"error {error:.1e}, allowed {bound:.1e}"
        return row("wrong", note, error), None
    return row("ok", "", error), call


def _other_operands(
    workload: Workload,
    case: Case,
    calls: dict[str, list[Call]],
    inputs: Any,
    device: torch.device,
):
    """Calls on other operands, as many as it takes to leave none in a GPU's cache."""
    if device.type != "cuda":
        return
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(x.numel() * x.element_size() for x in _tensors(inputs))
    copies = min(MOST_OPERANDS, -(-2 * cache // max(1, size)))
    providers = {provider.name: provider for provider in workload.providers(case)}
    for seed in range(1, copies):
        more = workload.inputs(case, device, seed)
        for name in list(calls):
            try:
                call = providers[name].prepare(case, more)
                call()
            except torch.OutOfMemoryError:
                forget()
                return
            yield name, call


def _time(
    calls: dict[str, list[Call]], found: dict[str, Measured], device: torch.device, budget: float
) -> None:
    """Adds the times. If all do not fit into memory side by side, the last ones are left out."""
    while calls:
        try:
            # No warm-up: the check was one.
            times = interleave(calls, device=device, budget=budget, warmup=0)
        except torch.OutOfMemoryError:
            name, _ = calls.popitem()
            note = "out of memory beside the other providers"
            found[name] = Measured(replace(found[name].row, status="failed", note=note))
            forget()
            continue
        for name, seconds in times.items():
            row = replace(found[name].row, timing=Timing.of(seconds))
            found[name] = Measured(row, seconds)
        return


def _can_be_captured(case: Case) -> bool:
    return case.group in WITHOUT_BACKWARD and not case.op.endswith("-step")


def _time_graphs(
    calls: dict[str, list[Call]],
    found: dict[str, Measured],
    device: torch.device,
    budget: float,
) -> None:
    """Adds the device's own time of small calls, from replays of CUDA graphs."""
    replays: dict[str, list[Callable[[], object]]] = {}
    for name, some in calls.items():
        timing = found[name].row.timing
        if timing is None or timing.median > GRAPH_BELOW:
            continue
        captured = [replay for call in some if (replay := cuda_graph(call)) is not None]
        if len(captured) == len(some):
            replays[name] = captured
    if replays:
        for name, seconds in interleave(replays, device=device, budget=budget).items():
            row = replace(found[name].row, graph=Timing.of(seconds))
            found[name] = Measured(row, found[name].seconds)


def _tensors(inputs: Any):
    """Every tensor in nested dataclasses, tuples, lists and dicts."""
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, dict):
        yield from _tensors(tuple(inputs.values()))
    elif isinstance(inputs, tuple | list):
        for part in inputs:
            yield from _tensors(part)
    elif hasattr(inputs, "__dataclass_fields__"):
        yield from _tensors(tuple(getattr(inputs, name) for name in inputs.__dataclass_fields__))


def forget() -> None:
    """Lets go of what calls have left behind: cycles, compiled code and all it holds, caches."""
    gc.collect()
    torch.compiler.reset()  # or its limit of recompilations would end in eager code
    _trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trim() -> None:
    """Back to the system what malloc was told to keep (KEEP_MEMORY in the Makefile).

    After the exact answer of a large model, in float64, it is gigabytes.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc's


def _one_line(problem: Exception) -> str:
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return text if len(text) <= 160 else text[:157] + "..."
