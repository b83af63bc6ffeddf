"""Every op and order launches the real way, in the grids that CUDA takes, with few kernels.

A rehearsal, in a process of its own, which test_launches.py starts:

    pytest -p tools.rehearsal.plugin [--rehearse=compile] tests/kernels/launches.py
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
    forward,
)
from torch import Tensor

from tests.kernels.attention_calls import make_call, tangents_like
from tests.ops.dual_ops import ATTENTION, OPS, Op
from tools import rehearsal

pytestmark = pytest.mark.gpu  # rehearsed with the tests that need one

MAX_GROUPS = 65_535  # CUDA's limit of grid axes 1 and 2
MANY = 70_000
FUSED = {name: op for name, op in (ATTENTION | OPS).items() if "triton" in op.backends}
ORDERS = ("forward", "first", "second")
EVERY = (True, True, True, True)


def launches_of(call: Callable[[], Any]) -> list[rehearsal.Launched]:
    rehearsal.forget_launches()
    call()
    return rehearsal.launches()


def new_kernels(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call loads, one for each specialisation."""
    before = len(rehearsal.loaded_kernels())
    call()
    return rehearsal.loaded_kernels()[before:]


def run(op: Op, order: str, lead: tuple[int, ...], width: int, dtype=torch.bfloat16) -> None:
    """Output and tangent, and the gradients of that order: by tangents, or by primals too."""
    primals, tangents = op.draw(lead, width, dtype=dtype)
    for x in tangents if order != "forward" else []:
        x.requires_grad_()
    for x in primals if order == "second" else []:
        x.requires_grad_()
    ours = functools.partial(op.ours, backend="triton")
    output, output_t = torch.func.jvp(ours, tuple(primals), tuple(tangents))
    if order == "first":
        output_t.sum().backward()
    if order == "second":
        (output.sum() + output_t.sum()).backward()


def check_grids(found: list[rehearsal.Launched]) -> None:
    """The stand-in refuses other grids; a launch that it took has no empty axis."""
    for one in found:
        assert 1 <= one.grid[0] < 2**31 and 1 <= one.grid[1] <= MAX_GROUPS and one.grid[2] == 1
        assert one.threads in (128, 256, 512, 1024)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FUSED)
def test_an_op_in_few_launches_and_the_same_for_other_sizes(name: str, order: str) -> None:
    op = FUSED[name]
    found = launches_of(lambda: run(op, order, (2, 5), 48))
    check_grids(found)
    backward = found[1:]
    assert len(backward) <= {"forward": 0, "first": 3, "second": 4}[order]
    assert backward or order == "forward" or name.startswith("linear")
    assert len({one.specialization for one in found}) == len(found)

    assert launches_of(lambda: run(op, order, (2, 5), 48)) == found

    def others() -> None:
        for lead in ((3, 17), (1, 197), (2, 64), (1, 1)):
            run(op, order, lead, 48)

    if name in OPS:  # attention: below
        assert new_kernels(others) == []


def test_home_shapes_of_attention() -> None:
    call, operands = attention("plain", tokens=197, dim=64)
    tangents = tangents_like(operands, 1, EVERY)
    check_home(launches_of(lambda: differentiate(call, tangents, second=False)), 3)


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_home_shapes_of_other_ops(name: str) -> None:
    check_home(launches_of(lambda: run(OPS[name], "first", (8, 197), 768)), 2)


def check_home(found: list[rehearsal.Launched], count: int) -> None:
    check_grids(found)
    assert len(found) == count
    for one in found:
        assert one.grid[0] > 1 and one.shared <= 227 << 10


PRESENT = [p for p in itertools.product((True, False), repeat=4) if any(p)]
KINDS = ("plain", "boolean", "bias", "one bias for all", "causal", "dropout", "grouped")


def attention(
    kind: str, batch=2, heads=4, tokens=37, dim=16, dtype=torch.bfloat16
) -> tuple[Call, tuple[Tensor | None, ...]]:
    """A call of that kind, and its operands."""
    query = torch.zeros(batch, heads, tokens, dim, dtype=dtype)
    key = torch.zeros(batch, heads // (2 if kind == "grouped" else 1), tokens, dim, dtype=dtype)
    masks = {
        "boolean": torch.ones(batch, 1, tokens, tokens, dtype=torch.bool),
        "bias": torch.zeros(1, heads, tokens, tokens, dtype=dtype),
        "one bias for all": torch.zeros(1, 1, 1, tokens, dtype=dtype),
    }
    mask = masks.get(kind)
    seed = torch.zeros(batch, dtype=torch.int64) if kind == "dropout" else None
    dropout = 0.1 if kind == "dropout" else 0.0
    call = Call(query, key, key.clone(), mask, seed, 0.125, dropout, kind == "causal")
    return call, (call.query, call.key, call.value, mask)


def differentiate(
    call: Call, tangents: list[Tensor | None], first: bool = True, second: bool = True
) -> None:
    """Forward pass, and gradients of the orders asked for, by all operands and tangents."""
    output, output_t, lse, mu = attention_jvp(call, *tangents)
    bias = call.mask is not None and call.mask.is_floating_point()
    needs = (True, True, True, bias)
    if first:
        attention_vjp(call, output, lse, torch.zeros_like(output_t), needs)
    if second:
        given = tuple(t is not None for t in tangents)
        attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, torch.zeros_like(output),
            torch.zeros_like(output_t), needs, given,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_any_tangents_options_and_sizes(kind: str) -> None:
    for present in PRESENT:
        call, operands = attention(kind)
        tangents = tangents_like(operands, 1, present)
        if all(t is None for t in tangents):
            continue
        check_grids(launches_of(lambda: differentiate(call, tangents)))  # noqa: B023

        def others() -> None:
            for sizes in ((2, 4, 197), (5, 4, 64), (1, 12, 50), (3, 2, 1)):
                call, operands = attention(kind, *sizes)
                differentiate(call, tangents_like(operands, 1, present))  # noqa: B023

        assert new_kernels(others) == [], present


@pytest.mark.parametrize("kind", KINDS)
def test_more_tangents_than_a_grid_holds(kind: str) -> None:
    """In chunks along grid axis 1, which together hold all tangents and cotangents."""
    call, operands = attention(kind, batch=1, heads=2, tokens=1, dim=8)
    tangents = tangents_like(operands, MANY, EVERY)
    found = launches_of(lambda: differentiate(call, tangents))
    check_grids(found)
    programs = Counter[str]()
    for one in found:
        programs[one.kernel] += one.grid[1]
    group = 1 if kind in ("boolean", "bias", "one bias for all", "dropout") else 2
    assert programs.pop("attention_jvp_kernel") == MANY // group
    assert programs and all(count >= 2 * MANY for count in programs.values())


def test_alignment_and_strides_are_specialised() -> None:
    """Operands off the 16 bytes, and strides that no multiple of 8 divides, are other kernels."""

    def passed(make: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: attention_jvp(make_call(*(make() for _ in range(3))), make()[None])

    shape, count = (2, 2, 9, 56), 2 * 2 * 9 * 56  # a head dimension of no other test
    kind = {"dtype": torch.float16}
    layouts = {
        "dense": lambda: torch.zeros(shape, **kind),
        "an odd address": lambda: torch.zeros(count + 1, **kind)[1:].view(shape),
        "odd strides": lambda: torch.zeros(2, 2, 9, 59, **kind)[..., :56],
    }
    for make in layouts.values():
        assert new_kernels(passed(make)) == ["attention_jvp_kernel"]
    for make in layouts.values():
        assert new_kernels(passed(make)) == []


def test_what_cuda_refuses_is_refused() -> None:
    """The stand-in itself: what is longer than a grid may be."""
    call, operands = attention("plain")
    (launch,) = forward.plan_jvp(call, *tangents_like(operands, 1, EVERY))[-1]
    launch.run()
    for grid in ((1, MAX_GROUPS + 1), (1, 1, MAX_GROUPS + 1)):
        with pytest.raises(RuntimeError, match=r"grid axis . is longer than 65535"):
            replace(launch, grid=grid).run()
    with pytest.raises(OverflowError):
        replace(launch, grid=(2**31,)).run()
    before = rehearsal.launch_count()
    replace(launch, grid=(1, MAX_GROUPS)).run()
    assert rehearsal.launch_count() == before + 1
