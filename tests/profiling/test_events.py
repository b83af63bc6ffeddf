"""Times of operations and kernels: from events written by hand, and from the profiler's own."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import images, moved, vit
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tangent_ops import linearize
from tangent_ops.profiling.events import Spent, by_family, cpu_time, cuda_time, most_expensive
from tangent_ops.profiling.families import FAMILIES

ENGINE = "autograd::engine::evaluate_function: "


def event(name: str, start: float, end: float, parent: Any = None, **more: Any) -> Any:
    """What `cpu_time` and `cuda_time` read of a profiler's event; times in microseconds."""
    made = SimpleNamespace(
        name=name,
        cpu_parent=parent,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=end - start,
        **{
            "thread": 1,
            "fwd_thread": 0,
            "sequence_nr": -1,
            "device_type": DeviceType.CPU,
            "device_index": 0,
            "is_user_annotation": False,
            "kernels": [],
            **more,
        },
    )
    if parent is not None:
        parent.self_cpu_time_total -= end - start
    return made


def kernel(name: str, duration: float) -> Any:
    return SimpleNamespace(name=name, device=0, duration=duration)


def on_cuda(name: str, start: float, end: float, **more: Any) -> Any:
    return event(name, start, end, device_type=DeviceType.CUDA, **more)


def attention_and_its_backward() -> list[Any]:
    """bmm in attention (it makes node 7), a bmm outside (node 8), and the nodes in thread 2."""
    sdpa = event("aten::scaled_dot_product_attention", 0, 30, sequence_nr=6)
    view = event("aten::view", 1, 2, sdpa, sequence_nr=6)
    inside = event("aten::bmm", 5, 25, sdpa, sequence_nr=7)
    outside = event("aten::bmm", 40, 50, sequence_nr=8)
    node_8 = event(ENGINE + "BmmBackward0", 100, 120, thread=2, fwd_thread=1, sequence_nr=8)
    inner_8 = event("BmmBackward0", 101, 115, node_8, thread=2, fwd_thread=1, sequence_nr=8)
    product_8 = event("aten::bmm", 103, 113, inner_8, thread=2)
    node_7 = event(ENGINE + "BmmBackward0", 130, 160, thread=2, fwd_thread=1, sequence_nr=7)
    inner_7 = event("BmmBackward0", 131, 150, node_7, thread=2, fwd_thread=1, sequence_nr=7)
    product_7 = event("aten::bmm", 133, 148, inner_7, thread=2)
    engine_7 = event("aten::add_", 152, 158, node_7, thread=2)  # gradients added up
    return [
        sdpa, view, inside, outside,
        node_8, inner_8, product_8, node_7, inner_7, product_7, engine_7,
    ]  # fmt: skip


def test_a_backward_pass_belongs_where_its_forward_pass_did() -> None:
    sums = by_family(cpu_time(attention_and_its_backward()))
    expected = {"attention": 30 + 30 - 6, "GEMM": 10 + 20, "elementwise": 6}
    assert sums == pytest.approx({**dict.fromkeys(FAMILIES, 0), **_milli(expected)})
    assert list(sums) == list(FAMILIES)


def test_the_order_of_events_does_not_matter() -> None:
    events = attention_and_its_backward()
    assert by_family(cpu_time(events[::-1])) == pytest.approx(by_family(cpu_time(events)))


def test_a_node_of_another_thread_is_another_node() -> None:
    """Sequence numbers count in each thread."""
    events = attention_and_its_backward()
    for one in events:
        if one.fwd_thread == 1:
            one.fwd_thread = 3
    sums = by_family(cpu_time(events))
    assert sums["attention"] == pytest.approx(30e-3)
    assert sums["GEMM"] == pytest.approx((10 + 20 + 24) * 1e-3)


def test_kernels_by_their_launch_and_by_their_name() -> None:
    sdpa = event("aten::scaled_dot_product_attention", 0, 30)
    inside = event("aten::bmm", 5, 25, sdpa, kernels=[kernel("sgemm", 100.0)])
    outside = event("aten::mm", 40, 50, kernels=[kernel("sgemm", 7.0), kernel("sgemm", 7.0)])
    device = [
        on_cuda("sgemm", 200, 300),
        on_cuda("sgemm", 300, 307),
        on_cuda("sgemm", 307, 314),
        on_cuda("sgemm", 400, 407),  # a third of 7 us, whose launch is not known
        on_cuda("grad_query_kernel", 500, 520),
        on_cuda("Memset (Device)", 530, 533),
        on_cuda("a range of the user", 0, 900, is_user_annotation=True),
    ]
    spent = cuda_time([sdpa, inside, outside, *device])
    expected = {"attention": 100 + 20, "GEMM": 7 + 7 + 7, "copy": 3}
    assert by_family(spent) == pytest.approx({**dict.fromkeys(FAMILIES, 0), **_milli(expected)})
    assert len(spent) == 6


def test_the_most_expensive_come_first_and_are_added_up() -> None:
    spent = [
        Spent("mm", "GEMM", 1000.0),
        Spent("bmm", "attention", 2500.0),
        Spent("mm", "GEMM", 2000.0),
        Spent("bmm", "GEMM", 500.0),
    ]
    found = [(t.name, t.family, t.milliseconds, t.calls) for t in most_expensive(spent, count=2)]
    assert found == [("mm", "GEMM", 3.0, 2), ("bmm", "attention", 2.5, 1)]


def step_of(side: str) -> Any:
    model, x = vit(init_values=None, global_pool="avg").eval(), images()
    if side == "tangent":
        run = moved(linearize(model))
    elif side == "jvp":
        weights = {name: p.detach() for name, p in model.named_parameters()}
        deltas = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}

        def run(x):
            def f(w):
                return torch.func.functional_call(model, w, (x,))

            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(f, (weights,), (deltas,))[1]
    else:
        run = model
    return lambda: F.cross_entropy(run(x), torch.tensor([1, 2])).backward()


@pytest.fixture(scope="module", params=["tangent", "jvp", "ordinary"])
def profiled(request: pytest.FixtureRequest) -> Any:
    step = step_of(request.param)
    step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        step()
    return record


def test_families_add_up_to_all_cpu_time(profiled: Any) -> None:
    total = sum(by_family(cpu_time(profiled.events())).values())
    assert total == pytest.approx(profiled.key_averages().self_cpu_time_total / 1e3)


def test_every_product_is_where_it_was_made(profiled: Any) -> None:
    """Batched products are attention's own, forward and backward; the linear layers' are not."""
    families = defaultdict(set)
    for one in cpu_time(profiled.events()):
        families[one.name].add(one.family)
    for name in ("aten::bmm", "aten::baddbmm"):
        assert families[name] <= {"attention"}
    for name in ("aten::addmm", "aten::mm"):
        assert families[name] == {"GEMM"}
    assert families["aten::_log_softmax"] == {"other"}
    assert {"attention", "norm", "activation", "GEMM"} <= set().union(*families.values())


def _milli(values: dict[str, float]) -> dict[str, float]:
    return {name: value / 1e3 for name, value in values.items()}
