"""Ways to nest derivatives of attention; each takes the op, so an oracle can take its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

Op = Callable[[Tensor, Tensor, Tensor], Tensor]

SHAPE = (2, 2, 5, 16)


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, their tangents, and two weights, drawn anew from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(8))


def jvp_of_attention(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    return jvp(op, (q, k, v), (q_t, k_t, v_t))


def dual_level(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    with forward_ad.dual_level():
        dual = map(forward_ad.make_dual, (q, k, v), (q_t, k_t, v_t))
        return tuple(forward_ad.unpack_dual(op(*dual)))


def partial_tangents(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    return (
        jvp(lambda x: op(x, k, v), (q,), (q_t,)),
        jvp(lambda x: op(q, x, v), (k,), (k_t,)),
        jvp(lambda x: op(q, k, x), (v,), (v_t,)),
    )


def grad_of_tangents(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    """The training step of a tangent model, by torch.func.grad."""

    def loss(tangents):
        output, output_t = jvp(op, (q, k, v), tangents)
        return (output_t * w).sum() + (output * u).sum()

    return grad(loss)((q_t, k_t, v_t))


def backward_to_tangents(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    """The same by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q_t, k_t, v_t)]
    _, output_t = jvp(op, (q, k, v), tuple(leaves))
    return torch.autograd.grad((output_t * w).sum(), leaves)


def backward_to_tangents_of_two_layers(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    """The first output is the second layer's query: a primal that needs no gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (q_t, k_t, v_t)]
    _, output_t = jvp(lambda *p: op(op(*p), *p[1:]), (q, k, v), tuple(leaves))
    return torch.autograd.grad((output_t * w).sum(), leaves)


def backward_after_a_dual_level_of_two_layers(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    leaves = [x.detach().clone().requires_grad_() for x in (q_t, k_t, v_t)]
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(p, t) for p, t in zip((q, k, v), leaves, strict=True)]
        _, output_t = forward_ad.unpack_dual(op(op(*dual), *dual[1:]))
    return torch.autograd.grad((output_t * w).sum(), leaves)


def grad_of_tangents_of_two_layers(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    two = lambda *p: op(op(*p), *p[1:])  # noqa: E731
    return grad(lambda t: (jvp(two, (q, k, v), t)[1] * w).sum())((q_t, k_t, v_t))


def backward_to_primals_through_value(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    output, _ = jvp(op, tuple(leaves), (q_t, k_t, v_t))
    return torch.autograd.grad((output * w).sum(), leaves)


def grad_of_primals_through_value(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    return grad(lambda p: (jvp(op, p, (q_t, k_t, v_t))[0] * w).sum())((q, k, v))


def grad_of_primals_through_tangent(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    return grad(lambda p: (jvp(op, p, (q_t, k_t, v_t))[1] * w).sum())((q, k, v))


def forward_over_reverse(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    """A Hessian-vector product; the loss is linear, so only the saved tensors carry a tangent."""
    gradient = grad(lambda p: (op(*p) * w).sum())
    return jvp(lambda *p: gradient(p), (q, k, v), (q_t, k_t, v_t))


def forward_over_reverse_of_square(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    gradient = grad(lambda p: (op(*p) * w).square().sum())
    return jvp(lambda *p: gradient(p), (q, k, v), (q_t, k_t, v_t))


def forward_over_reverse_of_vmap(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    gradient = grad(lambda p: (vmap(op)(*(x[:, None] for x in p)).squeeze(1) * w).sum())
    return jvp(lambda *p: gradient(p), (q, k, v), (q_t, k_t, v_t))


def backward_inside_dual_level(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    with forward_ad.dual_level():
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        dual = [forward_ad.make_dual(p, t) for p, t in zip(leaves, (q_t, k_t, v_t), strict=True)]
        grads = torch.autograd.grad((op(*dual) * w).sum(), dual)
        return tuple(forward_ad.unpack_dual(g).tangent for g in grads)


def jvp_of_jvp(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    inner = lambda *p: jvp(op, p, (q_t, k_t, v_t))[1]  # noqa: E731
    return jvp(inner, (q, k, v), (w, u, w))


def jvp_of_jvp_by_tangents(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    inner = lambda *t: jvp(op, (q, k, v), t)[1]  # noqa: E731
    return jvp(inner, (q_t, k_t, v_t), (w, u, w))


def jacfwd_of_attention(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    return jacfwd(lambda row: (op(q * row[:, None], k, v) * w).sum((0, 1, 2)))(u[0, 0, :, 0])


def jacfwd_of_jvp(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    def inner(row):
        return (jvp(lambda x: op(x, k, v), (q,), (q_t * row[:, None],))[1] * w).sum((0, 1, 2))

    return jacfwd(inner)(u[0, 0, :, 0])


def vmap_of_jvp_over_tangents(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    stacks = (torch.stack([t, 2 * t, w]) for t in (q_t, k_t, v_t))
    return vmap(lambda *t: jvp(op, (q, k, v), t)[1])(*stacks)


def vmap_of_jvp_over_data(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    one = lambda x, t: jvp(lambda y: op(y, k, v), (x,), (t,))[1]  # noqa: E731
    return vmap(one, (1, 2), 1)(torch.stack([q, w], 1), torch.stack([q_t, u], 2))


def vmap_of_grad_of_jvp(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    one = grad(lambda t: (jvp(lambda x: op(x, k, v), (q,), (t,))[1] * w).sum())
    return vmap(one)(torch.stack([q_t, u]))


def grad_of_vmap_of_jvp(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    one = lambda t: jvp(lambda x: op(x, k, v), (q,), (t,))[1]  # noqa: E731
    return grad(lambda stack: (vmap(one)(stack) * w).sum())(torch.stack([q_t, u]))


def jvp_of_vmap(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    mapped = vmap(lambda x: op(x, k, v))
    return jvp(mapped, (torch.stack([q, w]),), (torch.stack([q_t, u]),))


def double_backward(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    leaves = [x.detach().clone().requires_grad_() for x in (q_t, k_t, v_t)]
    weight = w.detach().clone().requires_grad_()
    _, output_t = jvp(op, (q, k, v), tuple(leaves))
    grads = torch.autograd.grad((output_t * weight).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * u).sum() for g in grads), weight)


def double_backward_after_a_dual_level(op: Op, q, k, v, q_t, k_t, v_t, w, u):
    leaves = [x.detach().clone().requires_grad_() for x in (q_t, k_t, v_t)]
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(p, t) for p, t in zip((q, k, v), leaves, strict=True)]
        _, output_t = forward_ad.unpack_dual(op(*dual))
    grads = torch.autograd.grad((output_t * w).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * u).sum() for g in grads), leaves)


FIRST_ORDER = [
    jvp_of_attention,
    dual_level,
    partial_tangents,
    grad_of_tangents,
    backward_to_tangents,
    backward_to_tangents_of_two_layers,
    backward_after_a_dual_level_of_two_layers,
    grad_of_tangents_of_two_layers,
    backward_to_primals_through_value,
    grad_of_primals_through_value,
    jacfwd_of_attention,
    vmap_of_jvp_over_tangents,
    vmap_of_jvp_over_data,
    vmap_of_grad_of_jvp,
    grad_of_vmap_of_jvp,
]

HIGHER_ORDER = [
    grad_of_primals_through_tangent,
    forward_over_reverse,
    forward_over_reverse_of_square,
    forward_over_reverse_of_vmap,
    backward_inside_dual_level,
    jvp_of_jvp,
    jvp_of_jvp_by_tangents,
    jacfwd_of_jvp,
    jvp_of_vmap,
    double_backward,
    double_backward_after_a_dual_level,
]
