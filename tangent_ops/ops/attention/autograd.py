"""Attention by the Triton kernels, with derivatives of every kind.

Three maps describe it (p: query, key, value, mask; t: R tangents of p):

    jvp(p, t)              O and O_t = DO(p) t              plain attention without t
    vjp(p, H)              DO(p)ᵀ H                         linear in H, with transpose jvp
    second_vjp(p, t, G, H) gradients of G·O + H·O_t by p and t

    backward of jvp: second_vjp, or vjp if p is frozen or H is absent
    backward of vjp by H: jvp; by p, along c: second_vjp(p, c, 0, H), because DO(p)ᵀ H is the
        gradient of H·O, and c times its derivative is the gradient of H·(DO(p) c)
    jvp of vjp along p': second_vjp(p, p', H', H), because the Hessian of H·O is symmetric

:mod:`tangent_ops.ops.attention.third_order` has the rest: forward mode over forward mode by p, and
derivatives of second_vjp.

Eager code uses an ``autograd.Function`` for each, because forward mode over forward mode silently
drops an operator's registered formula; a fourth, of jvp in plain dual levels, is faster. Code under
``torch.compile`` uses the registered formulas, because Dynamo does not support a Function with a
``jvp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from tangent_ops.ops.attention import operators as ops
from tangent_ops.ops.attention.third_order import eager_second_vjp, second_derivative
from tangent_ops.ops.levels import is_compiling

Optional = Tensor | None


def value_and_tangent(primals, seed, tangents, options) -> tuple[Tensor, Tensor]:
    """Attention and its tangent, each (B, H, N, Dv); the tangent is empty if all are None."""
    if not is_compiling() and peek_interpreter_stack() is None:
        output, output_t, *_ = _JvpOfPlain.apply(*primals, seed, *tangents, *options)
        return output, output_t
    apply = ops.attention_jvp if is_compiling() else _Jvp.apply
    output, output_t, *_ = apply(*primals, seed, *map(_one_row, tangents), *options)
    return output, output_t.squeeze(0)


def value_by_rule(operands, seed, options) -> Tensor:
    """Attention (B, H, N, Dv); the tangents of its operands are carried by `_Jvp`'s own rule."""
    return _Jvp.apply(*operands, seed, None, None, None, None, *options)[0]


def _is_dual(tensor: Optional) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _one_row(tensor: Optional) -> Optional:
    """R = 1 in front."""
    return None if tensor is None else tensor.unsqueeze(0)


def _save_jvp(ctx, inputs, output, dual=False):
    """``dual``: whether an operand has a tangent of an outer forward-mode level."""
    *operands, scale, dropout_p, is_causal = inputs
    ctx.options = (scale, dropout_p, is_causal)
    ctx.set_materialize_grads(False)
    primals, tangents = operands[:5], operands[5:]
    value, tangent, lse, mu = output
    ctx.tangents = sum(t is not None for t in tangents)
    moves = dual or any(ctx.needs_input_grad[:4])
    ctx.frozen = any(ctx.needs_input_grad[5:9]) and not moves
    if ctx.frozen:  # the backward pass is the anchor's own, which needs no tangent
        ctx.save_for_backward(*primals, None, None, None, None, value, None, lse, None)
    else:
        ctx.save_for_backward(*operands, value, tangent, lse, mu)
    constant = [lse, mu]
    if ctx.frozen:
        # Without this mark autograd would treat the output as depending on the tangents.
        constant.append(value)
    if not ctx.tangents:
        constant.append(tangent)
    ctx.mark_non_differentiable(*constant)


def _backward_jvp(ctx, saved, grad, grad_t, vjp, second_vjp):
    """Gradients by operands and tangents, from those of output and tangent."""
    primals, output, lse = saved[:5], saved[9], saved[11]
    needs, needs_t = ctx.needs_input_grad[:4], ctx.needs_input_grad[5:9]
    if ctx.tangents == 0:
        grad_t = None
    if any(needs) and grad_t is not None:
        found = second_vjp(*primals, *saved[5:13], grad, grad_t, *ctx.options, [*needs, *needs_t])
        primal, tangent = found[:4], found[4:]
    else:
        primal = tangent = (None,) * 4
        if any(needs) and grad is not None:
            found = vjp(*primals, output, lse, grad.unsqueeze(0), *ctx.options, list(needs))
            primal = [x.squeeze(0) if need else None for x, need in zip(found, needs, strict=True)]
        if any(needs_t) and grad_t is not None:
            tangent = vjp(*primals, output, lse, grad_t, *ctx.options, list(needs_t))
    return (*_wanted(primal, needs), None, *_wanted(tangent, needs_t), None, None, None)


def _wanted(found: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    return [x if need else None for x, need in zip(found, needs, strict=True)]


def _mark_unneeded(ctx, output) -> None:
    unneeded = (x for x, need in zip(output, ctx.needs, strict=True) if not need)
    ctx.mark_non_differentiable(*unneeded)


def _backward_jvp_compiled(ctx, grad, grad_t, grad_lse, grad_mu):
    vjp, second_vjp = ops.attention_vjp, ops.attention_second_vjp
    return _backward_jvp(ctx, ctx.saved_tensors, grad, grad_t, vjp, second_vjp)


# For compiled code, in which no operand is dual: forward mode over forward mode raises there.
ops.attention_jvp.register_autograd(_backward_jvp_compiled, setup_context=_save_jvp)


def _in_outer_levels(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a Function's ``jvp``: it gets the saved tensors, and its results have tangents.

    PyTorch switches forward mode off at every level within ``jvp``, so that the tangents of an
    outer level would silently be lost. The tangents of the current level are removed from the saved
    tensors.
    """

    def wrapped(ctx, *directions):
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [
                None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors
            ]
            return jvp(ctx, saved, *directions)

    return wrapped


class _Jvp(torch.autograd.Function):
    """attention_jvp."""

    @staticmethod
    def forward(*args):
        return ops.run_jvp(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_jvp(ctx, inputs, output, dual=any(map(_is_dual, inputs[:4])))
        ctx.save_for_forward(*inputs[:9], output[0], output[1])

    @staticmethod
    def vmap(info, in_dims, *args):
        return ops.batched_jvp(_Jvp.apply, info, in_dims, *args)

    @staticmethod
    def backward(ctx, grad, grad_t, grad_lse, grad_mu):
        return _differentiated(ctx, ctx.saved_tensors, grad, grad_t)

    @staticmethod
    @_in_outer_levels
    def jvp(ctx, saved, *directions):
        *primals, seed = saved[:5]
        tangents = saved[5:9]
        moves, moves_t = directions[:4], directions[5:9]
        # PyTorch requires a tensor for every differentiable output, and None for the others.
        output_d = None if ctx.frozen else torch.zeros_like(saved[9])
        tangent_d = None
        if any(d is not None for d in moves):
            rows = [None if d is None else d.unsqueeze(0) for d in moves]
            output_d = _Jvp.apply(*primals, seed, *rows, *ctx.options)[1].squeeze(0)
            if ctx.tangents:
                tangent_d = second_derivative(primals, tangents, moves, ctx.options)
        if any(d is not None for d in moves_t):
            linear = _Jvp.apply(*primals, seed, *moves_t, *ctx.options)[1]
            tangent_d = linear if tangent_d is None else tangent_d + linear
        if ctx.tangents and tangent_d is None:
            tangent_d = torch.zeros_like(saved[10])
        return output_d, tangent_d, None, None


class _JvpOfPlain(torch.autograd.Function):
    """`_Jvp` of one tangent, without R in front, where no operand is dual; outside ``torch.func``.

    It is faster: with a ``setup_context`` PyTorch inspects the signature of ``forward`` at every
    call, and views of tensors that require gradients are nodes of the graph.
    """

    @staticmethod
    def forward(ctx, *args):
        rows = map(_one_row, args[5:9])
        output, output_t, lse, mu = ops.run_jvp(*args[:5], *rows, *args[9:])
        if len(output_t):  # not a view: a view from a Function cannot change in place
            output_t = torch.ops.aten._unsafe_view(output_t, output_t.shape[1:])
        results = output, output_t, lse, mu
        # Operands and results as they are: those of a differentiable backward pass have a graph.
        _save_jvp(ctx, args, results)
        return results

    @staticmethod
    def backward(ctx, grad, grad_t, grad_lse, grad_mu):
        saved = list(ctx.saved_tensors)
        saved[5:9] = map(_one_row, saved[5:9])
        saved[10] = _one_row(saved[10]) if ctx.tangents else saved[10]
        found = list(_differentiated(ctx, saved, grad, _one_row(grad_t)))
        found[5:9] = (None if x is None else x.squeeze(0) for x in found[5:9])
        return tuple(found)


def _differentiated(ctx, saved, grad, grad_t):
    """The backward pass in eager code."""
    vjp, second_vjp = _Vjp.apply, _SecondVjp.apply
    if _derivatives_end(grad, grad_t, *saved):
        vjp, second_vjp = ops.run_vjp, ops.run_second_vjp
    return _backward_jvp(ctx, saved, grad, grad_t, vjp, second_vjp)


def _derivatives_end(*tensors: Optional) -> bool:
    """Whether a backward pass with these tensors need not be differentiable itself."""
    if torch.is_grad_enabled() or peek_interpreter_stack() is not None:
        return False
    return forward_ad._current_level < 0 or not any(map(_is_dual, tensors))


class _Vjp(torch.autograd.Function):
    """attention_vjp."""

    @staticmethod
    def forward(*args):
        return ops.run_vjp(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.needs = inputs[8:11], inputs[11]
        _mark_unneeded(ctx, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def vmap(info, in_dims, *args):
        return ops.batched_vjp(_Vjp.apply, info, in_dims, *args)

    @staticmethod
    def backward(ctx, *grads):
        *primals, output, lse, cotangent = ctx.saved_tensors
        needs = ctx.needs_input_grad
        along = [x if need else None for x, need in zip(grads, ctx.needs, strict=True)]
        if all(x is None for x in along):
            return (None,) * 12
        _, tangent, _, mu = _Jvp.apply(*primals, *along, *ctx.options)
        found = (None,) * 4
        if any(needs[:4]):
            found = _SecondVjp.apply(
                *primals, *along, output, tangent, lse, mu, None, cotangent, *ctx.options,
                [*needs[:4], False, False, False, False],
            )[:4]  # fmt: skip
        by_cotangent = tangent if needs[7] else None
        return (*_wanted(found, needs[:4]), None, None, None, by_cotangent, *(None,) * 4)

    @staticmethod
    @_in_outer_levels
    def jvp(ctx, saved, *directions):
        *primals, output, lse, cotangent = saved
        moves, cotangent_d = directions[:4], directions[7]
        if all(d is None for d in moves):
            found = _Vjp.apply(*primals, output, lse, cotangent_d, *ctx.options, ctx.needs)
            return tuple(_wanted(found, ctx.needs))
        rows = [None if d is None else d.unsqueeze(0) for d in moves]
        _, tangent, _, mu = _Jvp.apply(*primals, *rows, *ctx.options)
        needs = [*ctx.needs, False, False, False, False]
        each = [
            _SecondVjp.apply(
                *primals, *rows, output, tangent, lse, mu,
                None if cotangent_d is None else cotangent_d[r], cotangent[r : r + 1],
                *ctx.options, needs,
            )[:4]
            for r in range(cotangent.shape[0])
        ]  # fmt: skip
        stacks = (torch.stack(grads) for grads in zip(*each, strict=True))
        return tuple(_wanted(list(stacks), ctx.needs))


class _SecondVjp(torch.autograd.Function):
    """attention_second_vjp; its own derivatives are those of the eager formulas."""

    @staticmethod
    def forward(*args):
        return ops.run_second_vjp(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.needs = inputs[15:18], inputs[18]
        _mark_unneeded(ctx, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *inputs[5:9], *inputs[13:15])
        ctx.save_for_forward(*inputs[:4], *inputs[5:9], *inputs[13:15])

    @staticmethod
    def vmap(info, in_dims, *args):
        return ops.batched_second_vjp(_SecondVjp.apply, info, in_dims, *args)

    @staticmethod
    def backward(ctx, *grads):
        by = eager_second_vjp(ctx.saved_tensors, ctx.needs, ctx.options).pull_back(grads)
        return (*by[:4], None, *by[4:8], None, None, None, None, *by[8:], *(None,) * 4)

    @staticmethod
    @_in_outer_levels
    def jvp(ctx, saved, *directions):
        moved = (*directions[:4], *directions[5:9], *directions[13:15])
        return eager_second_vjp(saved, ctx.needs, ctx.options).push_forward(moved)
