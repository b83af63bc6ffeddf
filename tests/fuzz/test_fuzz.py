"""Random programs of ops and transforms, against float64 and elementary operations.

    pytest tests/fuzz                       150 programs, as `make test`
    pytest -m fuzz                          5,000
    pytest tests/fuzz --fuzz-seed 4711      one

Of a failure the message shows the program and what is left of it with all taken out that does not
matter. Right, refused by an error of ours, or refused by PyTorch alone as well: all else fails.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tangent_ops.ops import forward_ad
from tests.fuzz.grow import ENDS, NODES, Program, grow
from tests.fuzz.judge import FAILURES, outcome, smallest
from tests.fuzz.nodes import Node
from tests.fuzz.ops import OPS

ALWAYS = 150


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        seed = metafunc.config.getoption("fuzz_seed", None)
        metafunc.parametrize("seed", range(ALWAYS) if seed is None else [seed])


def failures(seeds, record_property) -> str:
    found = []
    for seed in seeds:
        program = grow(seed)
        how, seen, _ = outcome(program)
        record_property("fuzz", how)
        if how in FAILURES:
            found.append(f"{how}: {seen}\n  {program}\n  smallest: {smallest(program)}")
    return "\n".join(found)


def test_program(seed: int, record_property) -> None:
    if found := failures([seed], record_property):
        pytest.fail(found, pytrace=False)


@pytest.mark.fuzz
@pytest.mark.parametrize("hundred", range(50))
def test_a_hundred_programs(hundred: int, record_property) -> None:
    start = ALWAYS + 100 * hundred
    if found := failures(range(start, start + 100), record_property):
        pytest.fail(found, pytrace=False)


def test_few_programs_use_everything() -> None:
    programs = [grow(seed) for seed in range(ALWAYS)]
    assert {program.end for program in programs} == {*ENDS}
    assert set().union(*(program.kinds for program in programs)) == {*OPS, *NODES}


GELU = Node("gelu", (("approximate", "none"), ("live", (True,))))


@pytest.mark.parametrize("end", ["value", "gradient", "gradient_by_tangent"])
@pytest.mark.parametrize("wrong", ["scaled", "dropped"])
def test_a_wrong_tangent_is_found_and_made_small(monkeypatch, end: str, wrong: str) -> None:
    def broken(x, approximate="none", backend=None):
        y = F.gelu(x, approximate=approximate)
        return y.detach() if wrong == "dropped" else y + 0.01 * (x - x.detach())

    node = Node("jvp", (("live", True),), (GELU,)) if end != "gradient_by_tangent" else GELU
    silu = Node("silu", (("inplace", False), ("live", (True,))))
    program = Program(0, torch.float64, end, Node("seq", (), (silu, node)))
    assert outcome(program).how == "right"
    monkeypatch.setitem(forward_ad._ROUTES, F.gelu, broken)
    assert outcome(program).how == "wrong"
    assert smallest(program).root == node
