"""The activation kernels as maps of a dual op: of one operand x, or of a gate x and a value v."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

from tangent_ops.ops.dual_op import Maps


def activation_maps(gated: bool) -> Maps:
    """Maps whose options are ``(name,)``, one of ``tangent_kernels.activation.ACTIVATIONS``."""

    def jvp(primals, tangents, options):
        from tangent_kernels import activation

        y, y_t = activation.activation_jvp(*_pair(primals), *_pair(tangents), *options)
        return (y,), (y_t,), ()

    def vjp(saved, grads, needs, options):
        from tangent_kernels import activation

        found = activation.activation_vjp(*_pair(saved), grads[0], _needs(needs), *options)
        return found if gated else found[:1]

    def second_vjp(primals, tangents, saved, grads, grads_t, needs, needs_t, options):
        from tangent_kernels import activation

        operands = (*_pair(primals), *_pair(tangents))
        wanted = (*_needs(needs), *_needs(needs_t))
        both = (grads[0], grads_t[0])
        x, value, x_t, value_t = activation.activation_second_vjp(operands, both, wanted, *options)
        return ((x, value), (x_t, value_t)) if gated else ((x,), (x_t,))

    def _pair(operands) -> Any:
        return operands if gated else (*operands, None)

    def _needs(needs) -> Any:
        return needs if gated else (*needs, False)

    return Maps(jvp, lambda primals, outputs, statistics: primals, vjp, second_vjp)
