"""Every nesting of transforms through the reference backend is right."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import tangent_ops
from tests.ops import nestings, oracle

CASES = nestings.FIRST_ORDER + nestings.BEYOND_THE_KERNELS
# Dynamo traces no torch.autograd.grad (of ours, the cases named after "backward"), and PyTorch
# unpacks no dual tensor under vmap, which compiled code needs to find out what is dual.
NOT_COMPILED = ("backward", "jvp_of_vmap", "reverse_of_vmap")
COMPILED = [case for case in CASES if not any(name in case.__name__ for name in NOT_COMPILED)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_eager(case) -> None:
    found = case(tangent_ops.scaled_dot_product_attention, *nestings.inputs(torch.float64))
    exact = case(oracle.math_attention, *nestings.inputs(torch.float64))
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.__name__)
def test_compiled(case) -> None:
    torch._dynamo.reset()
    attention = tangent_ops.scaled_dot_product_attention
    compiled = torch.compile(lambda *a: case(attention, *a), fullgraph=True, backend="aot_eager")
    found = compiled(*nestings.inputs(torch.float64))
    exact = case(oracle.math_attention, *nestings.inputs(torch.float64))
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)
