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
from typing import Any

import torch
from torch import Tensor

CHECKS: dict[str, Callable[[], None]] = {}
ALIGNMENT = 16  # bytes


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def main() -> None:
    from tools import rehearsal
    from tools.rehearsal.count import count_only

    rehearsal.start()
    count_only()
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
        self.sizes: dict[int, int] = {}  # address -> bytes, of what a replay allocated


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Record launches at the last Python call before Triton's C launcher, which is not called."""
    from tangent_kernels import _launch, _plan
    from triton.backends.nvidia.driver import CudaLauncher

    seen = Seen()
    launcher, run, empty = CudaLauncher.__call__, _launch.Launch.run, _plan._empty

    def record(self, x, y, z, stream, function, metadata, *rest):
        _, _, _, *arguments = rest  # launch metadata and hooks come first
        seen.launches.append((self, function, metadata, (x, y, z), tuple(arguments)))

    def planned(self):
        seen.planned += 1
        return run(self)

    def sized(*layout):
        tensor = empty(*layout)
        seen.sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    CudaLauncher.__call__, _launch.Launch.run, _plan._empty = record, planned, sized
    try:
        yield seen
    finally:
        CudaLauncher.__call__, _launch.Launch.run, _plan._empty = launcher, run, empty


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


# --- random calls --------------------------------------------------------------------------


class Call:
    """A launcher of the kernels, with operands."""

    def __init__(self, name: str, run: Callable[[], Any], operands: list[Tensor | None]):
        self.name, self.run, self.operands = name, run, operands

    def __str__(self) -> str:
        layouts = [
            None if x is None else (tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % ALIGNMENT)
            for x in self.operands
        ]
        return f"{self.name} {layouts}"


def tensor(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in one of few layouts, so that calls meet the plans of others."""
    kind = draw.choice(["dense"] * 4 + ["offset", "aligned offset", "padded", "one row"])
    if kind == "one row":
        return torch.ones(shape[-1], dtype=dtype).expand(shape)
    last = shape[-1] + (8 if kind == "padded" else 0)
    offset = {"offset": 1, "aligned offset": 8 if dtype.itemsize < 8 else 2}.get(kind, 0)
    memory = torch.ones(torch.Size(shape[:-1]).numel() * last + offset, dtype=dtype)
    return memory[offset:].view(*shape[:-1], last)[..., : shape[-1]]


def present(draw: random.Random, *shape: int, dtype: torch.dtype) -> Tensor | None:
    return tensor(draw, shape, dtype) if draw.random() < 0.7 else None


def attention_call(draw: random.Random) -> Call:
    from tangent_kernels.attention import run_jvp, run_second_vjp, run_vjp

    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    batch, heads, rows, dim = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 16, 24]), 8
    count = draw.choice([1, 2, 7])
    shape = (batch, heads, rows, dim)
    q, k, v = (tensor(draw, shape, dtype) for _ in range(3))
    mask = mask_t = seed = None
    if draw.random() < 0.4:
        sizes = (draw.choice([1, batch]), draw.choice([1, heads]), rows, draw.choice([1, rows]))
        mask = tensor(draw, sizes, draw.choice([torch.bool, dtype, torch.float32]))
        if mask.is_floating_point():
            mask_t = present(draw, count, *sizes, dtype=mask.dtype)
    if draw.random() < 0.3:
        seed = torch.ones(batch, dtype=torch.int64)
    tangents = [present(draw, count, *shape, dtype=dtype) for _ in range(3)]
    causal = mask is None and draw.random() < 0.3
    options = (draw.choice([0.5, 1.0]), 0.0 if seed is None else 0.25, causal, None)
    operands = [q, k, v, mask, seed, *tangents, mask_t]
    if draw.random() < 0.4:
        return Call("jvp", lambda: run_jvp(tuple(operands), options), operands)
    output, lse = tensor(draw, shape, dtype), torch.ones(shape[:3])
    needs = tuple(draw.random() < 0.7 for _ in range(3)) + (mask_t is not None,)
    if draw.random() < 0.5:
        operands = [*operands[:5], output, lse, tensor(draw, (count, *shape), dtype)]
        return Call("vjp", lambda: run_vjp(tuple(operands), options, needs), operands)
    moved = any(x is not None for x in (*tangents[:2], mask_t))
    if all(x is None for x in (*tangents, mask_t)):
        return attention_call(draw)
    mu = torch.ones(count if moved else 0, *shape[:3])
    operands += [output, tensor(draw, (count, *shape), dtype), lse, mu]
    operands += [present(draw, *shape, dtype=dtype), tensor(draw, (count, *shape), dtype)]
    both = (*needs, *(x is not None and draw.random() < 0.7 for x in (*tangents, mask_t)))
    return Call("second", lambda: run_second_vjp(tuple(operands), options, both), operands)


def row_call(draw: random.Random) -> Call:
    from tangent_kernels import activation, layer_norm, linear, softmax

    dtype = draw.choice([torch.bfloat16, torch.float32])
    shape, width = (draw.choice([1, 3]), draw.choice([1, 16, 24])), 32

    def rows() -> Tensor:
        return tensor(draw, (*shape, width), dtype)

    def line(size: int = width) -> Tensor | None:
        found = present(draw, size, dtype=dtype)
        return found if found is None else found.contiguous()

    needs = [draw.random() < 0.7 for _ in range(5)]
    kind = draw.choice(
        ["layer", "layer back", "gelu", "gelu back", "softmax", "soft back", "linear"]
    )
    x, x_t, g = rows(), rows(), present(draw, *shape, width, dtype=dtype)
    h = rows()
    statistics = [torch.ones(*shape, 1), torch.ones(*shape, 1)]
    if kind == "layer":
        operands = [x, line(), line(), draw.choice([x_t, None]), line(), line()]
        options = (draw.choice([1e-5, 1e-6]), draw.random() < 0.5)
        return Call(kind, lambda: layer_norm.layer_norm_jvp(*operands, *options), operands)
    if kind == "layer back":
        mean, rstd = statistics
        weight, weight_t = line(), line()
        operands = [x, weight, mean, rstd, x_t, weight_t, g, h]
        return Call(
            kind,
            lambda: layer_norm.layer_norm_second_vjp(
                x, weight, mean, rstd, x_t, weight_t, (g, h), needs[:3], [True, *needs[3:]]
            ),
            operands,
        )
    if kind == "gelu":
        name = draw.choice(activation.ACTIVATIONS)
        return Call(kind, lambda: activation.activation_jvp(x, x_t, name), [x, x_t])
    if kind == "gelu back":
        name = draw.choice(activation.ACTIVATIONS)
        wanted = (needs[0], True)
        operands = [x, x_t, g, h]
        return Call(
            kind, lambda: activation.activation_second_vjp(x, x_t, (g, h), wanted, name), operands
        )
    if kind == "softmax":
        return Call(kind, lambda: softmax.softmax_jvp(x, x_t), [x, x_t])
    if kind == "soft back":
        wanted = (needs[0], True)
        return Call(
            kind, lambda: softmax.softmax_second_vjp(x, x_t, (g, h), wanted), [x, x_t, g, h]
        )
    weight, weight_t = (tensor(draw, (16, width), dtype) for _ in range(2))
    operands = [x, weight, line(16), draw.choice([x_t, None]), weight_t, line(16)]
    return Call(kind, lambda: linear.linear_jvp(*operands), operands)


def gelu(rows: int = 4) -> Call:
    from tangent_kernels.activation import activation_jvp

    x, x_t = torch.ones(rows, 32), torch.ones(rows, 32)
    return Call("gelu", lambda: activation_jvp(x, x_t, "gelu"), [x, x_t])


# --- checks --------------------------------------------------------------------------------


@check
def random_calls_of_attention_launch_what_planning_launches() -> None:
    replayed = sum(not compare(attention_call(random.Random(i % 150))) for i in range(300))
    assert replayed > 60, replayed


@check
def random_calls_of_rows_launch_what_planning_launches() -> None:
    replayed = sum(not compare(row_call(random.Random(i % 250))) for i in range(500))
    assert replayed > 150, replayed


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
        with configs.using(key, Config(16, 16, 4, 1)):
            assert tiles() == 4 != before
            assert tiles() == 4
        assert tiles() == before


@check
def hooks_and_knobs_of_triton_see_every_launch() -> None:
    from triton import knobs

    call = gelu()
    assert compare(call)
    assert not compare(call)
    names: list[str] = []

    def record(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    before = knobs.runtime.launch_enter_hook
    knobs.runtime.launch_enter_hook = record
    try:
        call.run()
        call.run()
        assert names == ["activation_kernel"] * 2, names
    finally:
        knobs.runtime.launch_enter_hook = before
    knobs.runtime.debug = True
    try:
        with watching() as seen:
            call.run()
        assert seen.planned
    finally:
        knobs.runtime.debug = False
    assert not compare(call)


@check
def a_plan_runs_on_its_own_device() -> None:
    from triton.runtime import driver

    active, device, entered = driver.active, torch.cuda.device, []
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
                assert shapes == [x.shape for x in call.operands]
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
    from tools.rehearsal.host_time import ops

    for name, op in ops().items():
        backward = op.backward()
        backward()
        with forward_ad.dual_level(), watching() as seen:
            op.function(*op.duals())
        assert seen.launches and not seen.planned, name
        with watching() as seen:
            backward()
        assert seen.launches and not seen.planned, name


if __name__ == "__main__":
    main()
