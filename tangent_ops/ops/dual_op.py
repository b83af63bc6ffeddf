"""Operations whose primal and tangent are computed together, as one differentiable Function.

An op is described once for each backend, by three maps of its primals p and their tangents t (None
where absent), each the derivative of another:

    jvp(p, t)                  outputs and their tangents
    vjp(p, H)                  gradients of H·y by p: of H·y_t by t, too
    second_vjp(p, t, G, H)     gradients of G·y + H·y_t by p and t

Where primals are frozen, as in a linearized model, the backward pass is vjp, and what it needs of
the primals is all that is saved. Otherwise it is second_vjp. Derivatives of the backward pass
itself are left to PyTorch's rules.
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

Tensors = Any  # a tuple of tensors, None where absent; how many, the op knows


@dataclass(frozen=True)
class Maps:
    """What one backend computes of an op. ``options`` are the op's, other than tensors.

    Attributes:
        jvp: (primals, tangents, options) -> outputs, their tangents, and statistics of the primals.
        save: (primals, outputs, statistics) -> what vjp wants beside a cotangent.
        vjp: (saved, cotangents of the outputs, needs, options) -> gradients by the primals.
        second_vjp: (primals, tangents, saved, cotangents of the outputs, those of the tangents,
            needs of the primals, needs of the tangents, options) -> gradients by both; None
            where the backend has none.
    """

    jvp: Callable[[Tensors, Tensors, Any], tuple[Tensors, Tensors, Tensors]]
    save: Callable[[Tensors, Tensors, Tensors], Tensors]
    vjp: Callable[[Tensors, Tensors, Sequence[bool], Any], Tensors]
    second_vjp: Callable[..., tuple[Tensors, Tensors]] | None = None


@dataclass(frozen=True)
class DualOp:
    """An op, by every backend.

    Attributes:
        function: PyTorch's own: (primals, options) -> outputs, a tuple.
        outputs: how many there are.
        reference: by eager formulas, its vjp differentiable by the cotangents; None to leave
            primals on a CPU to PyTorch's rules.
        triton: by kernels; saves what ``reference`` does.
    """

    function: Callable[[Tensors, Any], tuple[Tensor, ...]]
    outputs: int
    reference: Maps | None
    triton: Maps | None = None


def dual_outputs(
    op: DualOp,
    primals: Tensors,
    options: Any,
    backend: Backend | None = None,
    why_not_fused: str | None = None,
) -> tuple[Tensor, ...] | None:
    """The op's dual outputs; None if PyTorch's own rules must carry the tangent.

    They must in compiled code and inside ``torch.func`` transforms, where rules have to nest; but a
    single ``torch.func.jvp`` is for the kernels, with gradients of primals and tangents. What is
    traced (``make_fx``, ``torch.func.linearize``) is computed by the formulas.

    Args:
        op: the op.
        primals: operands, plain or dual, or None.
        options: of the op.
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
    # In a plain level the gradient of a tracked primal has a tangent itself.
    if plain and any(x.requires_grad for x in given):
        return None
    # Nothing to launch on, or a launch that a trace would not record.
    if op.triton is None or isinstance(given[0], FakeTensor) or is_traced():
        chosen = "reference"
    else:
        chosen = choose_backend(backend, given[0], why_not_fused)
    if chosen == "reference" and (op.reference is None or not plain):
        return None
    unpacked = tuple(pair[0] for pair in pairs)
    function = _InPlainLevel if plain else _Dual
    results = function.apply(op, chosen, options, *unpacked, *tangents)
    count = op.outputs
    return tuple(
        y if y_t is None else forward_ad.make_dual(y, y_t)
        for y, y_t in zip(results[:count], results[count : 2 * count], strict=True)
    )


def _in_a_single_jvp() -> bool:
    stack = get_interpreter_stack()
    return stack is not None and len(stack) == 1 and stack[0].key() == TransformType.Jvp


class _Dual(torch.autograd.Function):
    """Outputs, tangents and statistics, differentiable by primals and tangents."""

    @staticmethod
    def forward(op, chosen, options, *operands):
        primals, tangents = _halves(operands)
        outputs, outputs_t, statistics = getattr(op, chosen).jvp(primals, tangents, options)
        return *outputs, *outputs_t, *statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        op, chosen, options, *operands = inputs
        primals, tangents = _halves(operands)
        count = op.outputs
        outputs, outputs_t = output[:count], output[count : 2 * count]
        statistics = output[2 * count :]
        frozen = not any(_halves(ctx.needs_input_grad[3:])[0])
        saved = getattr(op, chosen).save(primals, outputs, statistics)
        ctx.op, ctx.chosen, ctx.options = op, chosen, options
        ctx.sizes = None if frozen else (len(primals), len(saved))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *(() if frozen else (*primals, *tangents)))
        constant = list(statistics)
        if frozen:
            # Unsaid, outputs would seem to depend on tangents, and the next layer would take its
            # primal operand for one that is trained.
            constant += outputs
        if not any(ctx.needs_input_grad):
            constant += outputs_t
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))

    @staticmethod
    def backward(ctx, *grads):
        count = ctx.op.outputs
        outer, inner = grads[:count], grads[count : 2 * count]
        needs, needs_t = _halves(ctx.needs_input_grad[3:])
        nothing = (None,) * len(needs)
        maps = getattr(ctx.op, ctx.chosen)
        if ctx.sizes is None:
            if all(grad is None for grad in inner):
                return (None, None, None, *nothing, *nothing)
            if torch.is_grad_enabled():
                maps = ctx.op.reference
                if maps is None:
                    raise UnsupportedError(
                        "a second derivative by the tangents of this op: pass backend='reference'"
                    )
            found = maps.vjp(ctx.saved_tensors, inner, needs_t, ctx.options)
            return (None, None, None, *nothing, *found)
        primal_count, saved_count = ctx.sizes
        saved, operands = ctx.saved_tensors[:saved_count], ctx.saved_tensors[saved_count:]
        primals, tangents = operands[:primal_count], operands[primal_count:]
        if torch.is_grad_enabled() or maps.second_vjp is None:
            found = _by_pytorch(
                ctx.op, primals, tangents, outer, inner, needs, needs_t, ctx.options
            )
        else:
            found = _by_kernels(
                maps, primals, tangents, saved, outer, inner, needs, needs_t, ctx.options
            )
        return (None, None, None, *found[0], *found[1])

    @staticmethod
    def jvp(ctx, *directions):
        raise UnsupportedError("forward mode over forward mode of a fused dual op")


class _InPlainLevel(torch.autograd.Function):
    """The same outside of ``torch.func``, where the old form of a Function does.

    With a ``setup_context`` PyTorch works out the signature of ``forward`` at every call, which
    takes longer than all else that Python does for it.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _Dual.forward(*inputs)
        _Dual.setup_context(ctx, inputs, output)
        return output

    backward = _Dual.backward
    jvp = _Dual.jvp


def _by_kernels(maps, primals, tangents, saved, outer, inner, needs, needs_t, options):
    """Gradients through outputs and tangents."""
    if all(grad is None for grad in inner):
        nothing = (None,) * len(needs_t)
        if all(grad is None for grad in outer):
            return nothing, nothing
        return maps.vjp(saved, outer, needs, options), nothing
    return maps.second_vjp(primals, tangents, saved, outer, inner, needs, needs_t, options)


def _by_pytorch(op, primals, tangents, outer, inner, needs, needs_t, options):
    """The same by PyTorch's rules, differentiable once more."""
    with torch.enable_grad():
        moving = [
            i for i, (p, t) in enumerate(zip(primals, tangents, strict=True)) if t is not None
        ]

        def function(*some):
            operands = list(primals)
            for i, x in zip(moving, some, strict=True):
                operands[i] = x
            return op.function(tuple(operands), options)

        outputs, outputs_t, *_ = torch.func.jvp(
            function,
            tuple(primals[i] for i in moving),
            tuple(tangents[i] for i in moving),
        )
        pairs = [
            (y, grad)
            for y, grad in zip((*outputs, *outputs_t), (*outer, *inner), strict=True)
            if grad is not None
        ]
        operands, needed = (*primals, *tangents), (*needs, *needs_t)
        wanted = [x for x, need in zip(operands, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        grads = [next(found) if need else None for need in needed]
    return grads[: len(needs)], grads[len(needs) :]


def _halves(operands: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    half = len(operands) // 2
    return tuple(operands[:half]), tuple(operands[half:])
