"""Ways to nest derivatives, each a function of (op, primals, tangents, other directions).

Operands are tuples; the op returns one tensor. An oracle can take the op's place.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

from tests.ops.transforms import pattern


def weighed(y, phase: float = 0.5):
    """A weighted sum, linear in y."""
    return (y * pattern(y.shape, y, phase)).sum()


def curved(y):
    return weighed(y.sin())


def along(op, p, t):
    return jvp(op, p, t)[1]


def stacked(*several):
    """Tuples of operands as one tuple of stacks."""
    return tuple(torch.stack(each) for each in zip(*several, strict=True))


def of_two_coefficients(op, p, t, u):
    """The op at p + c0 t + c1 u, few enough numbers for a whole Jacobian."""
    return lambda c: op(*(x + c[0] * y + c[1] * z for x, y, z in zip(p, t, u, strict=True)))


def jvp_of_jvp(op, p, t, u):
    return jvp(lambda *p: along(op, p, t), p, u)


def jvp_of_jvp_by_tangents(op, p, t, u):
    return jvp(lambda *t: along(op, p, t), t, u)


def grad_of_jvp(op, p, t, u):
    """By primals and tangents, through output and tangent."""

    def loss(p, t):
        output, output_t = jvp(op, p, t)
        return curved(output) + curved(output_t)

    return grad(loss, (0, 1))(p, t)


def grad_of_jvp_by_tangents(op, p, t, u):
    """The training step of a tangent model."""
    return grad(lambda t: curved(along(op, p, t)))(t)


def jvp_of_grad(op, p, t, u):
    """A Hessian-vector product."""
    return jvp(grad(lambda p: curved(op(*p))), (p,), (t,))


def jvp_of_grad_of_a_linear_loss(op, p, t, u):
    """Here only the saved tensors carry a tangent."""
    return jvp(grad(lambda p: weighed(op(*p))), (p,), (t,))


def jvp_of_grad_of_vmap(op, p, t, u):
    gradient = grad(lambda *p: curved(vmap(op)(*p)), tuple(range(len(p))))
    return jvp(gradient, stacked(p, u), stacked(t, t))


def grad_of_jvp_of_grad(op, p, t, u):
    """A third derivative."""
    by_p = grad(lambda p: curved(op(*p)))
    return grad(lambda p: sum(map(weighed, jvp(by_p, (p,), (t,))[1])))(p)


def jacfwd_of_op(op, p, t, u):
    return jacfwd(of_two_coefficients(op, p, t, u))(pattern((2,), p[0], 0.5))


def jacfwd_of_jvp(op, p, t, u):
    return jacfwd(of_two_coefficients(lambda *t: along(op, p, t), t, u, p))(
        pattern((2,), p[0], 0.5)
    )


def vmap_of_jvp_over_tangents(op, p, t, u):
    return vmap(lambda *t: along(op, p, t))(*stacked(t, u, t))


def vmap_of_jvp_over_the_first_operand(op, p, t, u):
    """The primal mapped over its second dimension, the tangent over its last."""
    first = torch.stack([p[0], u[0]], min(1, p[0].ndim)), torch.stack([t[0], p[0]], -1)

    def one(x, x_t):
        return jvp(op, (x, *p[1:]), (x_t, *t[1:]))

    return vmap(one, (min(1, p[0].ndim), -1))(*first)


def vmap_of_grad_of_jvp(op, p, t, u):
    return vmap(grad(lambda t: curved(along(op, p, t))))(stacked(t, u))


def vmap_of_grad_by_operands_that_are_not_mapped(op, p, t, u):
    """Gradients of each sample by what the samples share."""

    def one(x):
        return grad(lambda *rest: curved(along(op, (x, *rest), t)), tuple(range(len(p) - 1)))(
            *p[1:]
        )

    return vmap(one)(torch.stack([p[0], u[0]])) if len(p) > 1 else ()


def grad_of_vmap_of_jvp(op, p, t, u):
    return grad(lambda t: curved(vmap(lambda *t: along(op, p, t))(*t)))(stacked(t, u))


def jvp_of_vmap(op, p, t, u):
    return jvp(vmap(op), stacked(p, u), stacked(t, t))


def backward_in_a_dual_level(op, p, t, u):
    """Forward over reverse where the primals are tracked."""
    with forward_ad.dual_level():
        leaves = [x.detach().clone().requires_grad_() for x in p]
        dual = [forward_ad.make_dual(x, x_t) for x, x_t in zip(leaves, t, strict=True)]
        grads = torch.autograd.grad(curved(op(*dual)), dual)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


CASES = [
    jvp_of_jvp,
    jvp_of_jvp_by_tangents,
    grad_of_jvp,
    grad_of_jvp_by_tangents,
    jvp_of_grad,
    jvp_of_grad_of_a_linear_loss,
    jvp_of_grad_of_vmap,
    grad_of_jvp_of_grad,
    jacfwd_of_op,
    jacfwd_of_jvp,
    vmap_of_jvp_over_tangents,
    vmap_of_jvp_over_the_first_operand,
    vmap_of_grad_of_jvp,
    vmap_of_grad_by_operands_that_are_not_mapped,
    grad_of_vmap_of_jvp,
    jvp_of_vmap,
    backward_in_a_dual_level,
]
