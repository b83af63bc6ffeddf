"""Runs an op that computes its output and tangent together as one differentiable Function.

Each backend describes an op by three maps of primals p and tangents t (None where absent):

    jvp(p, t)                  the output y and its tangent y_t
    vjp(p, H)                  gradients of H·y by p, which are also those of H·y_t by t
    second_vjp(p, t, G, H)     gradients of G·y + H·y_t by p and t

If primals are frozen, as in a linearized model, the backward pass is vjp and saves only the primals
it needs. Otherwise the backward pass is second_vjp. PyTorch's rules give the derivatives of the
backward pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.backend import (
    Backend,
    choose_backend,
    in_forward_ad,
    in_plain_dual_level,
    is_traced,
)
from tangent_ops.ops.levels import is_compiling

Tensors = Any  # a tuple of tensors, None where absent, as many as the op has operands


@dataclass(frozen=True)
class Maps:
    """One backend's maps of an op. ``options`` are the op's arguments other than tensors.

    Attributes:
        jvp: (primals, tangents, options) -> output, its tangent, and statistics of the primals.
        save: (primals, output, statistics) -> the tensors that vjp takes besides a cotangent.
        vjp: (saved, cotangent of the output, needs, options) -> gradients by the primals.
        second_vjp: (primals, tangents, saved, cotangent of the output, cotangent of the tangent,
            needs of the primals, needs of the tangents, options) -> gradients by both; or None.
    """

    jvp: Callable[[Tensors, Tensors, Any], tuple[Tensor, Tensor, Tensors]]
    save: Callable[[Tensors, Tensor, Tensors], Tensors]
    vjp: Callable[[Tensors, Tensor, Sequence[bool], Any], Tensors]
    second_vjp: Callable[..., tuple[Tensors, Tensors]] | None = None


@dataclass(frozen=True)
class DualOp:
    """An op and its maps by backend.

    Attributes:
        function: PyTorch's own function: (primals, options) -> output.
        reference: maps by eager formulas; vjp is differentiable by the cotangent. None to leave
            operands on a CPU to PyTorch's rules.
        triton: maps by kernels, which save the same tensors as ``reference``.
    """

    function: Callable[[Tensors, Any], Tensor]
    reference: Maps | None
    triton: Maps | None = None


def dual_output(
    op: DualOp,
    primals: Tensors,
    options: Any,
    backend: Backend | None = None,
    why_not_fused: str | None = None,
) -> Tensor | None:
    """The op's dual output; None if PyTorch's own rules must carry the tangent.

    PyTorch's rules compute compiled code and calls inside ``torch.func`` transforms, where rules
    have to nest. The kernels also compute a single ``torch.func.jvp``, with gradients of primals
    and tangents. Traced calls (``make_fx``, ``torch.func.linearize``) use the formulas.

    Args:
        op: the op.
        primals: operands, plain or dual, or None.
        options: the op's arguments other than tensors.
        backend: None chooses by device.
        why_not_fused: why the kernels cannot compute this call, or None if they can.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels cannot compute the call.
    """
    if not in_forward_ad() or is_compiling():
        return None
    plain = in_plain_dual_level()
    if not plain and not _in_a_single_jvp():
        return None
    given = [x for x in primals if x is not None]
    pairs = [(None, None) if x is None else forward_ad.unpack_dual(x) for x in primals]
    tangents = tuple(pair[1] for pair in pairs)
    if all(tangent is None for tangent in tangents):
        return None
    if not all(x.dtype.is_floating_point for x in given):
        return None
    # In a plain level the gradient by a tracked primal has a tangent as well.
    if plain and any(x.requires_grad for x in given):
        return None
    # A fake tensor has no data to launch a kernel on, and a trace would not record the launch.
    if op.triton is None or isinstance(given[0], FakeTensor) or is_traced():
        chosen = "reference"
    else:
        chosen = choose_backend(backend, given[0], why_not_fused)
    if chosen == "reference" and (op.reference is None or not plain):
        return None
    unpacked = tuple(pair[0] for pair in pairs)
    function = _InPlainLevel if plain else _Dual
    output, output_t, *_ = function.apply(op, chosen, options, *unpacked, *tangents)
    return forward_ad.make_dual(output, output_t)


def _in_a_single_jvp() -> bool:
    stack = get_interpreter_stack()
    return stack is not None and len(stack) == 1 and stack[0].key() == TransformType.Jvp


class _Dual(torch.autograd.Function):
    """Output, tangent and statistics, differentiable by primals and tangents."""

    @staticmethod
    def forward(op, chosen, options, *operands):
        primals, tangents = _halves(operands)
        output, output_t, statistics = getattr(op, chosen).jvp(primals, tangents, options)
        return output, output_t, *statistics

    @staticmethod
    def setup_context(ctx, inputs, results):
        op, chosen, options, *operands = inputs
        primals, tangents = _halves(operands)
        output, output_t, *statistics = results
        frozen = not any(_halves(ctx.needs_input_grad[3:])[0])
        saved = getattr(op, chosen).save(primals, output, statistics)
        ctx.op, ctx.chosen, ctx.options = op, chosen, options
        ctx.sizes = None if frozen else (len(primals), len(saved))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *(() if frozen else (*primals, *tangents)))
        constant = statistics
        if frozen:
            # Without this mark autograd would treat the output as depending on the tangents.
            constant = [*constant, output]
        if not any(ctx.needs_input_grad):
            constant = [*constant, output_t]
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    def backward(ctx, grad, grad_t, *_):
        needs, needs_t = _halves(ctx.needs_input_grad[3:])
        nothing = (None,) * len(needs)
        maps = getattr(ctx.op, ctx.chosen)
        if ctx.sizes is None:
            if grad_t is None:
                return (None, None, None, *nothing, *nothing)
            if torch.is_grad_enabled():
                maps = ctx.op.reference
                if maps is None:
                    raise UnsupportedError(
                        "this op's Triton kernel has no second derivative by the tangents: "
                        "pass backend='reference'"
                    )
            found = maps.vjp(ctx.saved_tensors, grad_t, needs_t, ctx.options)
            return (None, None, None, *nothing, *found)
        primal_count, saved_count = ctx.sizes
        every = ctx.saved_tensors  # read once: a checkpoint recomputes them, and only once
        saved, operands = every[:saved_count], every[saved_count:]
        primals, tangents = operands[:primal_count], operands[primal_count:]
        if torch.is_grad_enabled() or maps.second_vjp is None:
            found = _by_pytorch(
                ctx.op, primals, tangents, grad, grad_t, needs, needs_t, ctx.options
            )
        else:
            found = _by_kernels(
                maps, primals, tangents, saved, grad, grad_t, needs, needs_t, ctx.options
            )
        return (None, None, None, *found[0], *found[1])

    @staticmethod
    def jvp(ctx, *directions):
        raise UnsupportedError("forward mode over forward mode of a fused dual op")


class _InPlainLevel(torch.autograd.Function):
    """`_Dual` outside of ``torch.func``, without ``setup_context``, which is faster.

    With a ``setup_context`` PyTorch inspects the signature of ``forward`` at every call, which
    takes longer than all other Python code of the call.
    """

    @staticmethod
    def forward(ctx, *inputs):
        results = _Dual.forward(*inputs)
        _Dual.setup_context(ctx, inputs, results)
        return results

    backward = _Dual.backward
    jvp = _Dual.jvp


def _by_kernels(maps, primals, tangents, saved, grad, grad_t, needs, needs_t, options):
    """Gradients through the output and its tangent."""
    if grad_t is None:
        nothing = (None,) * len(needs_t)
        found = nothing if grad is None else maps.vjp(saved, grad, needs, options)
        return found, nothing
    return maps.second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options)


def _by_pytorch(op, primals, tangents, grad, grad_t, needs, needs_t, options):
    """The same by PyTorch's rules, differentiable again."""
    with torch.enable_grad():
        moving = [
            i for i, (p, t) in enumerate(zip(primals, tangents, strict=True)) if t is not None
        ]

        def function(*some):
            operands = list(primals)
            for i, x in zip(moving, some, strict=True):
                operands[i] = x
            return op.function(tuple(operands), options)

        results: Any = torch.func.jvp(
            function,
            tuple(primals[i] for i in moving),
            tuple(tangents[i] for i in moving),
        )
        pairs = [
            (y, cotangent)
            for y, cotangent in zip(results, (grad, grad_t), strict=True)
            if cotangent is not None
        ]
        operands, needed = (*primals, *tangents), (*needs, *needs_t)
        wanted = [x for x, need in zip(operands, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [cotangent for _, cotangent in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        grads = [next(found) if need else None for need in needed]
    return grads[: len(needs)], grads[len(needs) :]


def _halves(operands: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    half = len(operands) // 2
    return tuple(operands[:half]), tuple(operands[half:])
