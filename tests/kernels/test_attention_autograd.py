"""The Triton backend as an op: under PyTorch's transforms, with masks, compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import tangent_ops
from tangent_ops.errors import UnsupportedError
from tests.ops import oracle
from tests.ops.backends import examples

attention = functools.partial(tangent_ops.scaled_dot_product_attention, backend="triton")


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k, v, their tangents, and two weights, drawn anew from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, 2, 3, 8, generator=generator) for _ in range(8))
    return tuple(x.to(device, dtype) for x in drawn)


def agree(found, exact) -> None:
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["hessian", "jacrev", "vmap_of_hvp", "third"])
def test_derivatives_of_a_bias(transform, device) -> None:
    """By a bias alone that batch and heads share: its derivatives are sums over both."""
    q, k, v, *_, w, _ = inputs(device=device)
    bias, along = (torch.randn(3, 3, generator=torch.Generator().manual_seed(s)) for s in (4, 5))

    def answer(op, q, k, v, w, bias, along):
        q, k, v, w = (x[:1, :1] for x in (q, k, v, w))
        loss = lambda b: (op(q, k, v, attn_mask=b) * w).square().sum()  # noqa: E731
        if transform == "hessian":
            return hessian(lambda c: loss(bias * c.sum() + along * c[0]))(along[0, :2])
        if transform == "jacrev":
            return jacrev(lambda b: (op(q, k, v, attn_mask=b) * w).sum((0, 1, 3)))(bias)
        if transform == "third":
            return grad(lambda b: (jvp(grad(loss), (b,), (along,))[1] * bias).sum())(bias)
        hvp = lambda t: jvp(grad(loss), (bias,), (t,))[1]  # noqa: E731
        return vmap(hvp)(torch.stack([along, bias]))

    given = [q, k, v, w, bias.to(device), along.to(device)]
    agree(answer(attention, *given), answer(oracle.math_attention, *oracle.double(given)))


def test_vmap_over_tangents_is_one_launch_of_many(launched, device) -> None:
    q, k, v, q_t, *_ = inputs(device=device)
    stack = torch.stack([q_t, 2 * q_t, -q_t])
    vmap(lambda t: jvp(lambda x: attention(x, k, v), (q,), (t,))[1])(stack)
    assert launched == [[3, q.shape]]
    launched.clear()
    vmap(vmap(lambda t: jvp(lambda x: attention(x, k, v), (q,), (t,))[1]))(stack[None])
    assert launched == [[3, q.shape]]
    launched.clear()
    torch.func.jacfwd(lambda c: attention(q + c[0] * q_t + c[1] * k, k, v))(
        torch.zeros(2, device=device)
    )
    assert launched == [[2, q.shape]]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step(compiler, device) -> None:
    """Forward and backward of a compiled function, by tangents, primals, and both at once."""
    torch._dynamo.reset()
    q, k, v, q_t, k_t, v_t, w, u = inputs(device=device)

    def run(op, q, k, v, q_t, k_t, v_t, w, u):
        output, output_t = jvp(op, (q, k, v), (q_t, k_t, v_t))
        return (output_t * w).sum(), (output * u).sum() + (output_t * w).sum()

    for leaves, index in (((3, 4, 5), 0), ((0, 1, 2), 0), ((0, 1, 2, 3, 4, 5), 1)):
        args = [q, k, v, q_t, k_t, v_t, w, u]
        for leaf in leaves:
            args[leaf] = args[leaf].clone().requires_grad_()
        pick = functools.partial(lambda i, *a: run(attention, *a)[i], index)
        found = torch.compile(pick, fullgraph=True, backend=compiler)(*args)
        grads = torch.autograd.grad(found, [args[leaf] for leaf in leaves])
        right = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
        exact = run(oracle.math_attention, *right)[index]
        agree(found, exact)
        agree(grads, torch.autograd.grad(exact, [right[leaf] for leaf in leaves]))


def test_compiled_with_a_bias(device) -> None:
    torch._dynamo.reset()
    q, k, v, q_t, k_t, v_t, w, _ = inputs(device=device)
    bias, bias_t = (x.requires_grad_() for x in torch.randn(2, 1, 2, 3, 3, device=device).unbind())

    def run(op, bias, bias_t):
        pair = jvp(lambda *a: op(*a), (q, k, v, bias), (q_t, k_t, v_t, bias_t))
        return (pair[1] * w).sum()

    found = torch.compile(functools.partial(run, attention), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(found(bias, bias_t), (bias, bias_t))
    for one, eager in zip(
        grads, torch.autograd.grad(run(attention, bias, bias_t), (bias, bias_t)), strict=True
    ):
        torch.testing.assert_close(one, eager)
    q, k, v, q_t, k_t, v_t, w = oracle.double([q, k, v, q_t, k_t, v_t, w])
    right = [x.detach().double().requires_grad_() for x in (bias, bias_t)]
    agree(grads, torch.autograd.grad(run(oracle.math_attention, *right), right))


def test_dropout_is_reproducible_and_one_mask_for_all(device) -> None:
    """Its derivative is that of the function with the mask held: central differences agree."""
    q, k, v, q_t, k_t, v_t, w, _ = inputs(device=device)

    def loss(step):
        torch.manual_seed(1)
        return (attention(q + step * q_t, k + step * k_t, v + step * v_t, dropout_p=0.4) * w).sum()

    torch.manual_seed(1)
    dropped = functools.partial(attention, dropout_p=0.4)
    output, output_t = jvp(dropped, (q, k, v), (q_t, k_t, v_t))
    torch.testing.assert_close((output * w).sum(), loss(0.0), rtol=1e-5, atol=1e-6)
    difference = (loss(1e-2) - loss(-1e-2)) / 2e-2
    torch.testing.assert_close((output_t * w).sum(), difference, rtol=2e-2, atol=2e-2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(1)
    grads = torch.autograd.grad((dropped(*leaves) * w).sum(), leaves)
    along = sum((g * t).sum() for g, t in zip(grads, (q_t, k_t, v_t), strict=True))
    torch.testing.assert_close(along, (output_t * w).sum(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(dropped(q, k, v), dropped(q, k, v))


def test_dropout_in_second_derivatives_and_under_checkpointing(device) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v, q_t, k_t, _, w, _ = inputs(device=device)
    dropped = functools.partial(attention, dropout_p=0.4)

    def hvp():
        torch.manual_seed(1)
        return jvp(grad(lambda x: (dropped(x, k, v) * w).square().sum()), (q,), (q_t,))[1]

    def gradient(x):
        torch.manual_seed(1)
        return grad(lambda x: (dropped(x, k, v) * w).square().sum())(x)

    difference = (gradient(q + 1e-2 * q_t) - gradient(q - 1e-2 * q_t)) / 2e-2
    torch.testing.assert_close(hvp(), difference, rtol=3e-2, atol=3e-2)

    leaf = q.clone().requires_grad_()
    grads = []
    for call in (dropped, lambda *a: checkpoint(dropped, *a, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad((call(leaf, k, v) * w).sum(), leaf)[0])
    assert torch.equal(*grads)
    with pytest.raises(UnsupportedError, match=r"with dropout; pass backend='reference'"):
        jvp(lambda x: jvp(lambda y: dropped(y, k, v), (x,), (q_t,))[1], (q,), (k_t,))


def test_dropout_under_vmap_follows_its_randomness(device) -> None:
    q, k, v, q_t, *_ = inputs(device=device)
    one = lambda x, t: jvp(lambda y: attention(y, k, v, dropout_p=0.4), (x,), (t,))  # noqa: E731
    stack, stack_t = torch.stack([q, q]), torch.stack([q_t, q_t])
    output, output_t = vmap(one, randomness="same")(stack, stack_t)
    assert torch.equal(output[0], output[1]) and torch.equal(output_t[0], output_t[1])
    output, output_t = vmap(one, randomness="different")(stack, stack_t)
    assert not torch.equal(output[0], output[1]) and not torch.equal(output_t[0], output_t[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(one)(stack, stack_t)


def test_plain_tensors_by_the_named_backend(device) -> None:
    q, k, v, *_, w, _ = inputs(device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = attention(*leaves)
    agree(output, oracle.math_attention(*oracle.double([q, k, v])))
    grads = torch.autograd.grad(output, leaves, w)
    agree(grads, oracle.attention_vjp(oracle.double([q, k, v]), w.double()))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)])
@pytest.mark.parametrize("mask", [None, (4, 4), (1, 4), (1,), "whole", "outer"])
def test_any_number_of_leading_dimensions(lead, mask, device) -> None:
    torch.manual_seed(0)
    shapes = {"whole": (*lead, 4, 4), "outer": (*lead[:1], *(1 for _ in lead[1:]), 4, 4)}
    masks = [] if mask is None else [torch.randn(shapes.get(mask, mask), device=device)]
    check_jvp([*torch.randn(3, *lead, 4, 8, device=device), *masks], (*lead, 4, 8))


def test_heads_that_broadcast(device) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 3, 4, 8, device=device)
    check_jvp([query, *torch.randn(2, 1, 3, 5, 8, device=device)], query.shape)


def check_jvp(primals, shape) -> None:
    """Value and tangent, of this shape, and gradients by the tangents."""
    tangents = [torch.randn_like(p).requires_grad_() for p in primals]
    found = jvp(attention, tuple(primals), tuple(tangents))
    assert found[0].shape == found[1].shape == shape
    right = [t.detach().double().requires_grad_() for t in tangents]
    exact = oracle.attention_jvp(oracle.double(primals), right)
    agree(found, exact)
    agree(
        torch.autograd.grad(found[1].sin().sum(), tangents),
        torch.autograd.grad(exact[1].sin().sum(), right),
    )


def test_operators_obey_their_schema(device) -> None:
    """torch's own checks of schema, fake kernels (shapes, strides) and autograd registration."""
    q, k, v, *tangents, w, u = inputs(device=device)
    ops, options = torch.ops.tangent_ops, (0.25, 0.0, False)
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    packed = torch.randn(1, 3, 3, 2, 8, device=device)[:, :, 0].transpose(1, 2)
    bias = torch.randn(1, 2, 3, 3, device=device)
    tangents = [torch.stack([t, -t]) for t in tangents]
    bias_t = torch.randn(2, *bias.shape, device=device)
    grad, grad_t = w, torch.stack([w, u])
    for some in (
        (*tangents, bias_t),
        (tangents[0], None, None, None),
        (None, None, tangents[2], None),
    ):
        check(ops.attention_jvp, (packed, k, v, bias, None, *some, *options))
        call = (q, k, v, bias, None)
        output, _, lse, _ = found = ops.attention_jvp(*call, *some, *options)
        for needs in ([True] * 8, [False, True, False, True, False, False, True, False]):
            arguments = (*call, *some, *found, grad, grad_t, *options, needs)
            check(ops.attention_second_vjp, arguments)
        for needs in ([True] * 4, [False, True, False, False]):
            check(ops.attention_vjp, (*call, output, lse, grad_t, *options, needs))


@pytest.mark.parametrize("second_order", [False, True])
def test_nothing_saved_for_backward_is_square(second_order, device) -> None:
    """A frozen primal keeps q, k, v, output and lse; a trained one its tangents and μ besides."""
    saved = []
    q, k, v, q_t, k_t, v_t = (torch.randn(1, 1, 64, 16, device=device) for _ in range(6))
    (q if second_order else q_t).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(tuple(x.shape)) or x, lambda x: x
    ):
        jvp(attention, (q, k, v), (q_t, k_t, v_t))
    first = [(1, 1, 64, 16)] * 4 + [(1, 1, 64)]
    second = [(1, 1, 1, 64, 16)] * 4 + [(1, 1, 1, 64)]
    assert sorted(saved) == sorted(first + second if second_order else first)


def test_hessian_vector_product_of_a_model(device) -> None:
    """By parameters, as tangent kernels, Laplace and influence functions need it."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True, activation="gelu"
    ).to(device)
    weights = dict(layer.named_parameters())
    along = {n: torch.randn_like(p) for n, p in weights.items()}
    x = torch.randn(1, 4, 16, device=device)

    def hvp(layer, weights, along, x, mode):
        def loss(weights):
            with mode():
                return functional_call(layer, weights, (x,)).square().sum()

        return jvp(grad(loss), (weights,), (along,))[1]

    fused = functools.partial(tangent_ops.fused_forward_ad, backend="triton")
    detach = lambda d: {n: p.detach() for n, p in d.items()}  # noqa: E731
    found = hvp(layer, detach(weights), along, x, fused)
    wide = oracle.double([detach(weights), along, x])
    math = functools.partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.MATH)
    exact = hvp(layer.double(), *wide, math)
    for n in exact:
        assert oracle.error(found[n], exact[n]) <= 2e-4 * float(exact[n].norm()) + 1e-6


@examples(15)
@given(
    seed=st.integers(0, 2**31),
    mapped=st.lists(st.booleans(), min_size=9, max_size=9).filter(any),
    dims=st.lists(st.integers(0, 2), min_size=9, max_size=9),
    mask=st.sampled_from([(2, 2, 3, 4), (1, 2, 3, 4), (1, 1, 1, 4), (3, 4), "boolean"]),
    what=st.sampled_from(["jvp", "gradient of the tangent", "hvp"]),
)
def test_vmap_over_any_operands(seed, mapped, dims, mask, what, device) -> None:
    """Any subset of operands, tangents and cotangent, mapped along any axis, against a loop."""
    torch.manual_seed(seed)
    boolean = mask == "boolean"
    shapes = [(2, 2, 3, 8), (2, 1, 4, 8), (2, 1, 4, 8), (1, 2, 3, 4) if boolean else mask]
    shapes = [*shapes, *shapes, (2, 2, 3, 8)]

    def value(shape, is_mapped, dim, i):
        full = list(shape)
        full.insert(min(dim, len(shape)), 2) if is_mapped else None
        drawn = torch.randn(full, device=device)
        if not boolean or i != 3:
            return drawn
        return (drawn > -0.5).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=device), True)

    given_ = [value(*each, i) for i, each in enumerate(zip(shapes, mapped, dims, strict=True))]
    in_dims = [
        min(dim, len(shape)) if is_mapped else None
        for shape, is_mapped, dim in zip(shapes, mapped, dims, strict=True)
    ]

    def answer(op, *operands):
        primals, tangents, w = operands[:4], operands[4:8], operands[8]
        if boolean:
            held, primals, tangents = primals[3], primals[:3], tangents[:3]
            attend = lambda q, k, v: op(q, k, v, held, enable_gqa=True)  # noqa: E731
        else:
            attend = lambda *a: op(*a, enable_gqa=True)  # noqa: E731
        if what == "jvp":
            return jvp(attend, primals, tangents)
        if what == "hvp":
            return jvp(grad(lambda p: (attend(*p) * w).sum()), (primals,), (tangents,))
        loss = lambda p, t: (jvp(attend, p, t)[1] * w).sum()  # noqa: E731
        return grad(loss, (0, 1))(primals, tangents)

    found = vmap(functools.partial(answer, attention), tuple(in_dims))(*given_)
    wide = oracle.double(given_)
    each = [
        answer(
            oracle.math_attention,
            *(x if d is None else x.select(d, i) for x, d in zip(wide, in_dims, strict=True)),
        )
        for i in range(2)
    ]
    agree(found, tree_map(lambda *xs: torch.stack(xs), *each))
