"""The activation kernels as maps of a dual op.

The options are ``(name,)``, one of ``tangent_kernels.activation.ACTIVATIONS``.
"""

from __future__ import annotations

from tangent_ops.ops.dual_op import Maps


def _jvp(primals, tangents, options):
    from tangent_kernels import activation

    return *activation.activation_jvp(primals[0], tangents[0], *options), ()


def _vjp(saved, grad, needs, options):
    from tangent_kernels import activation

    return (activation.activation_vjp(saved[0], grad, *options),)


def _second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options):
    from tangent_kernels import activation

    both, wanted = (grad, grad_t), (*needs, *needs_t)
    x, x_t = activation.activation_second_vjp(primals[0], tangents[0], both, wanted, *options)
    return (x,), (x_t,)


def _save(primals, output, statistics):
    return primals


ACTIVATION_MAPS = Maps(_jvp, _save, _vjp, _second_vjp)
