"""Every nesting of transforms through the reference backend is right."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves

import tangent_ops
from tests.ops import nestings, oracle

CASES = nestings.FIRST_ORDER + nestings.HIGHER_ORDER
# Dynamo traces no torch.autograd.grad (of ours, the cases named after "backward"). Under vmap or
# grad inside a forward-mode level, compiled code cannot find out what is dual, and raises.
NOT_TRACED = [case for case in CASES if "backward" in case.__name__]
RAISES_COMPILED = [
    nestings.forward_over_reverse,
    nestings.forward_over_reverse_of_square,
    nestings.forward_over_reverse_of_vmap,
    nestings.jvp_of_vmap,
]
COMPILED = [case for case in CASES if case not in NOT_TRACED + RAISES_COMPILED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_eager(case) -> None:
    found = case(tangent_ops.scaled_dot_product_attention, *nestings.inputs(torch.float64))
    exact = case(oracle.math_attention, *nestings.inputs(torch.float64))
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


def compile_case(case):
    torch._dynamo.reset()
    attention = tangent_ops.scaled_dot_product_attention
    return torch.compile(lambda *a: case(attention, *a), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.__name__)
def test_compiled(case) -> None:
    found = compile_case(case)(*nestings.inputs(torch.float64))
    exact = case(oracle.math_attention, *nestings.inputs(torch.float64))
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", RAISES_COMPILED, ids=lambda case: case.__name__)
def test_compiled_code_raises_where_it_cannot_see_tangents(case) -> None:
    with pytest.raises((TorchDynamoException, NotImplementedError)):
        compile_case(case)(*nestings.inputs(torch.float64))
