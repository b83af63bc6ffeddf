"""Checks of replayed launches, in a process of its own: ``python -m tests.tools.plans``.

The oracle is Triton's binder: a call that is replayed has to launch what the same call launches
when it is planned anew, the same compiled kernel with the same grid and arguments. Kernels are told
apart, not compiled (:mod:`tools.rehearsal.count`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.tools.random_calls import Call, attention_call, gelu, row_call

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def main() -> None:
    import triton

    from tools import rehearsal
    from tools.rehearsal.count import count_only

    rehearsal.start()
    count_only()
    driver: Any = triton.runtime.driver.active
    driver.launcher_cls = Launcher
    answers = {}
    for name, function in CHECKS.items():
        forget_plans()
        try:
            function()
            answers[name] = ""
        except Exception:
            answers[name] = traceback.format_exc()
    print(json.dumps(answers))


# --- what a call launches ------------------------------------------------------------------


def forget_plans() -> None:
    from tangent_kernels import _plan

    _plan._plans.clear()


class Seen:
    """The launches of a block, and how many of them were planned."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.planned = 0
        self.kept: list[Any] = []  # alive, so that no later tensor has the address of a freed one
        self.sizes: dict[int, int] = {}  # address -> bytes, of what a replay allocated


class Launcher:
    """In the place of Triton's launcher in C: it records a launch, and calls the first hook."""

    watchers: ClassVar[list[Seen]] = []

    def __init__(self, source: Any, metadata: Any): ...

    def __call__(self, *arguments: Any) -> None:
        *grid, _, function, metadata, about, hook, _ = arguments[:9]
        if hook is not None:
            hook(about)
        for seen in self.watchers:
            seen.launches.append((self, function, metadata, tuple(grid), arguments[9:]))


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    from tangent_kernels import _launch, _plan

    seen = Seen()
    run, empty = _launch.Launch.run, _plan._empty

    def planned(self):
        seen.planned += 1
        seen.kept.append(self)
        return run(self)

    def sized(*layout):
        tensor = empty(*layout)
        seen.sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        seen.kept.append(tensor)
        return tensor

    _launch.Launch.run, _plan._empty = planned, sized
    Launcher.watchers.append(seen)
    try:
        yield seen
    finally:
        Launcher.watchers.remove(seen)
        _launch.Launch.run, _plan._empty = run, empty


def launched(call: Call) -> tuple[list[Any], list[Any], bool]:
    """What the call launches, with names for addresses; its results' layouts; if it was planned."""
    with watching() as seen:
        results = flat(call.run())
    names = {x.data_ptr(): f"result {i}" for i, x in enumerate(results) if x is not None}
    names |= {x.data_ptr(): f"operand {i}" for i, x in enumerate(call.operands) if x is not None}
    scratch: dict[int, str] = {}

    def named(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(named, x))
        address = x.data_ptr() if isinstance(x, Tensor) else x
        if not isinstance(address, int) or address < 2**32:
            return type(x), x
        size = x.numel() * x.element_size() if isinstance(x, Tensor) else seen.sizes.get(address)
        fresh = f"scratch {len(scratch)} of {size} bytes"
        return names.get(address) or scratch.setdefault(address, fresh)

    launches = [(*one[:-1], named(one[-1])) for one in seen.launches]
    layouts = [None if x is None else (x.shape, x.stride(), x.dtype) for x in results]
    return launches, layouts, seen.planned > 0


def flat(results: Any) -> list[Tensor | None]:
    if results is None or isinstance(results, Tensor):
        return [results]
    return [x for one in results for x in flat(one)]


def planned_anew(call: Call) -> tuple[list[Any], list[Any]]:
    """What the call launches without the plans of earlier calls, which are kept."""
    from tangent_kernels import _plan

    kept = dict(_plan._plans)
    forget_plans()
    launches, layouts, planned = launched(call)
    assert planned or not launches
    forget_plans()
    _plan._plans.update(kept)
    return launches, layouts


def compare(call: Call) -> bool:
    """Raise unless the call launches what it should; return whether it was planned."""
    launches, layouts, planned = launched(call)
    expected, expected_layouts = planned_anew(call)
    assert layouts == expected_layouts, f"{call}: {layouts}, not {expected_layouts}"
    assert len(launches) == len(expected), call
    for one, other in zip(launches, expected, strict=True):
        for i, (found, right) in enumerate(zip(one, other, strict=True)):
            assert found == right, f"{call}, {i}: {found}, not {right}"
    return planned


# --- checks --------------------------------------------------------------------------------


def compare_many(make: Callable[..., Call], kinds: int, rounds: int) -> None:
    """Calls of so many kinds, each in several layouts, of which some were there before."""
    calls = [
        make(random.Random(kind), random.Random(kind + layout % 5))
        for layout in range(rounds)
        for kind in range(kinds)
    ]
    replayed = sum(not compare(call) for call in calls)
    assert replayed > len(calls) // 8, replayed


@check
def random_calls_of_attention_launch_what_planning_launches() -> None:
    compare_many(attention_call, 40, 8)


@check
def random_calls_of_rows_launch_what_planning_launches() -> None:
    compare_many(row_call, 60, 8)


@check
def an_address_that_is_no_multiple_of_16_is_planned_each_time() -> None:
    from tangent_kernels.activation import activation_jvp

    x, x_t, y = torch.ones(4, 32), torch.ones(4, 32), torch.ones(4 * 32 + 1)
    shifted = y[1:].view(4, 32)
    assert compare(Call("first", lambda: activation_jvp(x, x_t, "gelu"), [x, x_t]))
    for operands in ([x, shifted], [shifted, x]):
        for _ in range(2):
            assert compare(Call("", lambda o=operands: activation_jvp(*o, "gelu"), operands))
    assert not compare(Call("again", lambda: activation_jvp(x, x_t, "gelu"), [x, x_t]))


@check
def one_tensor_as_two_operands_is_no_plan_for_two_tensors() -> None:
    from tangent_kernels.attention import run_jvp

    options = (0.5, 0.0, False, None)
    x, y, z = (torch.ones(1, 1, 16, 8) for _ in range(3))
    for operands in ([x, x, x], [x, y, x], [x, y, z], [z, z, y]):
        operands = [*operands, *(None,) * 6]
        with watching() as seen:
            run_jvp(tuple(operands), options)
        (launch,) = seen.launches
        found = [one[0] for one in launch[-1][:3]]
        found = [one.data_ptr() if isinstance(one, Tensor) else one for one in found]
        assert found == [one.data_ptr() for one in operands[:3]]


@check
def tiles_that_the_user_sets_are_used() -> None:
    from tangent_kernels._launch import Config
    from tangent_kernels.attention import Call as Checked
    from tangent_kernels.attention import configs, run_jvp

    operands = [*(torch.ones(1, 1, 64, 8) for _ in range(3)), *(None,) * 6]
    options = (0.5, 0.0, False, None)
    call = Call("attention", lambda: run_jvp(tuple(operands), options), operands)
    key = configs.key_of("forward x1", Checked(*operands[:5], *options))

    def tiles() -> int:
        with watching() as seen:
            call.run()
        return seen.launches[0][3][0]

    before = tiles()
    assert tiles() == before
    for _ in range(2):
        with configs.using(key, Config(32, 16, 4, 1)):
            assert tiles() == 2 != before
            assert tiles() == 2
        assert tiles() == before


@check
def hooks_and_knobs_of_triton_see_every_launch() -> None:
    from triton import knobs

    runtime: Any = knobs.runtime
    call = gelu()
    assert compare(call)
    assert not compare(call)
    names: list[str] = []

    def record(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    before = runtime.launch_enter_hook
    runtime.launch_enter_hook = record
    try:
        call.run()
        call.run()
        assert names == ["activation_kernel"] * 2, names
    finally:
        runtime.launch_enter_hook = before
    runtime.debug = True
    try:
        with watching() as seen:
            call.run()
        assert seen.planned
    finally:
        runtime.debug = False
    assert not compare(call)


@check
def a_plan_runs_on_its_own_device() -> None:
    from triton.runtime import driver

    active: Any = driver.active
    device, entered = torch.cuda.device, []
    call = gelu()
    compare(call)
    before = active.get_current_device
    active.get_current_device = lambda: 1
    torch.cuda.device = lambda index: entered.append(index) or contextlib.nullcontext()
    try:
        with watching() as seen:
            call.run()
        assert entered == [0] and not seen.planned
    finally:
        active.get_current_device, torch.cuda.device = before, device


@check
def plans_are_few_and_keep_no_tensor() -> None:
    from tangent_kernels import _plan

    most, _plan.MOST = _plan.MOST, 4
    try:
        for rows in range(1, 12):
            call = gelu(rows)
            results = flat(call.run())
            call.run()
            assert 1 <= len(_plan._plans) <= 4
            alive = [weakref.ref(x) for x in (*call.operands, *results)]
            del call, results
            gc.collect()
            assert not any(one() is not None for one in alive)
    finally:
        _plan.MOST = most


@check
def threads_share_plans() -> None:
    errors: list[Exception] = []

    def work(seed: int) -> None:
        try:
            draw = random.Random(seed)
            for _ in range(50):
                call = gelu(draw.choice([1, 2, 3, 4]))
                shapes = [x.shape for x in flat(call.run()) if x is not None]
                assert shapes == [x.shape for x in flat(tuple(call.operands)) if x is not None]
        except Exception as error:
            errors.append(error)

    with watching():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors


@check
def dual_ops_are_replayed_forward_and_backward() -> None:
    from torch.autograd import forward_ad

    from tools.host_time import ops

    for name, op in ops("cpu").items():
        backward = op.backward()
        backward()
        with forward_ad.dual_level(), watching() as seen:
            op.function(*op.duals())
        assert seen.launches and not seen.planned, name
        with watching() as seen:
            backward()
        assert seen.launches and not seen.planned, name


@check
def profilers_and_modes_see_the_operator() -> None:
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    from tools.host_time import ops

    names: set[str] = set()

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(str(func))
            return func(*args, **(kwargs or {}))

    op = ops("cpu")["attention"]
    backward = op.backward()
    for _ in range(2):  # also where there are plans
        names.clear()
        with forward_ad.dual_level(), Log():
            op.function(*op.duals())
            backward()
        for name in ("attention_jvp", "attention_vjp"):
            assert f"tangent_ops.{name}.default" in names, names
        with forward_ad.dual_level(), torch.profiler.profile() as seen:
            op.function(*op.duals())
            backward()
        profiled = {event.key for event in seen.key_averages()}
        assert {"tangent_ops::attention_jvp", "tangent_ops::attention_vjp"} <= profiled


if __name__ == "__main__":
    main()
