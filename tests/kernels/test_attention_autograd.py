"""The Triton backend under PyTorch's transforms: right, or refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves

import tangent_ops
from tangent_ops.errors import UnsupportedError
from tests.ops import nestings, oracle

attention = functools.partial(tangent_ops.scaled_dot_product_attention, backend="triton")
name = lambda case: case.__name__  # noqa: E731

# Dynamo traces no torch.autograd.grad, and no torch.func.grad around a custom operator.
COMPILED = [c for c in nestings.FIRST_ORDER if "grad" not in name(c) and "backward" not in name(c)]
NOT_COMPILED = [
    case
    for case in nestings.FIRST_ORDER + nestings.BEYOND_THE_KERNELS
    if case not in COMPILED and "backward" not in name(case)
]


def agree(found, exact) -> None:
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", nestings.FIRST_ORDER, ids=name)
def test_first_order_is_right(case, device) -> None:
    found = case(attention, *nestings.inputs(device=device))
    agree(found, case(oracle.math_attention, *nestings.inputs(torch.float64, device)))


@pytest.mark.parametrize("case", nestings.BEYOND_THE_KERNELS, ids=name)
def test_the_rest_is_refused_by_name(case, device) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)riton.*reference"):
        case(attention, *nestings.inputs(device=device))


@pytest.mark.parametrize("case", COMPILED, ids=name)
def test_compiled_is_right(case, device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: case(attention, *a), fullgraph=True, backend="aot_eager")
    found = compiled(*nestings.inputs(device=device))
    agree(found, case(oracle.math_attention, *nestings.inputs(torch.float64, device)))


@pytest.mark.parametrize("case", NOT_COMPILED, ids=name)
def test_the_rest_does_not_compile(case, device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: case(attention, *a), fullgraph=True, backend="aot_eager")
    with pytest.raises((TorchDynamoException, NotImplementedError)):
        compiled(*nestings.inputs(device=device))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step(compiler, device) -> None:
    """Forward and backward of a compiled function, to the tangents and through the value."""
    torch._dynamo.reset()
    q, k, v, q_t, k_t, v_t, w, u = nestings.inputs(device=device)

    def run(op, q, k, v, q_t, k_t, v_t):
        return torch.func.jvp(op, (q, k, v), (q_t, k_t, v_t))

    for leaves, index, weight in (((3, 4, 5), 1, w), ((0, 1, 2), 0, u)):
        args = [q, k, v, q_t, k_t, v_t]
        for leaf in leaves:
            args[leaf] = args[leaf].clone().requires_grad_()
        pick = functools.partial(lambda i, *a: run(attention, *a)[i], index)
        found = torch.compile(pick, fullgraph=True, backend=compiler)(*args)
        grads = torch.autograd.grad((found * weight).sum(), [args[leaf] for leaf in leaves])
        right = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
        exact = run(oracle.math_attention, *right)[index]
        agree(found, exact)
        exact_grads = torch.autograd.grad(
            (exact * weight.double()).sum(), [right[leaf] for leaf in leaves]
        )
        agree(grads, exact_grads)


def test_compiled_gradients_through_the_tangent_are_refused(device) -> None:
    torch._dynamo.reset()
    q, k, v, q_t, k_t, v_t, *_ = nestings.inputs(device=device)
    q.requires_grad_()
    compiled = torch.compile(
        lambda *a: torch.func.jvp(attention, a[:3], a[3:])[1], fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="does not compute gradients of query"):
        compiled(q, k, v, q_t, k_t, v_t).sum().backward()


def test_plain_tensors_by_the_named_backend(device) -> None:
    q, k, v, *_, w, _ = nestings.inputs(device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = attention(*leaves)
    agree(output, oracle.math_attention(*oracle.double([q, k, v])))
    grads = torch.autograd.grad(output, leaves, w)
    agree(grads, oracle.attention_vjp(oracle.double([q, k, v]), w.double()))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
def test_any_number_of_leading_dimensions(lead, device) -> None:
    torch.manual_seed(0)
    primals = torch.randn(3, *lead, 7, 16, device=device).unbind()
    tangents = torch.randn(3, *lead, 7, 16, device=device).unbind()
    found = torch.func.jvp(attention, primals, tangents)
    assert found[0].shape == found[1].shape == (*lead, 7, 16)
    agree(found, oracle.attention_jvp(oracle.double(primals), oracle.double(tangents)))


def test_heads_that_broadcast(device) -> None:
    torch.manual_seed(0)
    primals = [torch.randn(2, 3, 7, 16, device=device), *torch.randn(2, 1, 3, 5, 16, device=device)]
    tangents = [torch.randn_like(p).requires_grad_() for p in primals]
    found = torch.func.jvp(attention, tuple(primals), tuple(tangents))
    right = [t.detach().double().requires_grad_() for t in tangents]
    exact = oracle.attention_jvp(oracle.double(primals), right)
    agree(found, exact)
    agree(
        torch.autograd.grad(found[1].sin().sum(), tangents),
        torch.autograd.grad(exact[1].sin().sum(), right),
    )


def test_operators_obey_their_schema(device) -> None:
    """torch's own checks of schema, fake kernels (shapes, strides) and autograd registration."""
    q, k, v, q_t, k_t, v_t, w, _ = nestings.inputs(device=device)
    ops = torch.ops.tangent_ops
    packed = torch.randn(2, 5, 3, 2, 16, device=device)[:, :, 0].transpose(1, 2)
    checks = ("test_schema", "test_faketensor")
    for tangents in ((q_t, k_t, v_t), (q_t, None, None), (None, None, None)):
        torch.library.opcheck(ops.attention_jvp, (packed, k, v, *tangents, 0.25), test_utils=checks)
    output, _, lse = ops.attention_jvp(q, k, v, None, None, None, 0.25)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            ops.attention_vjp, (q, k, v, output, lse, w, 0.25, *needs), test_utils=checks
        )


def test_peak_memory_holds_no_square_matrix() -> None:
    """What the forward pass saves for backward: q, k, v, output and lse, nothing N x N."""
    saved = []
    q, k, v, q_t, k_t, v_t = (torch.randn(1, 1, 64, 16) for _ in range(6))
    q_t.requires_grad_()
    if torch.cuda.is_available():
        q, k, v, q_t, k_t, v_t = (x.cuda() for x in (q, k, v, q_t, k_t, v_t))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        torch.func.jvp(attention, (q, k, v), (q_t, k_t, v_t))
    assert sorted(map(tuple, saved)) == sorted([(1, 1, 64, 16)] * 4 + [(1, 1, 64)])
