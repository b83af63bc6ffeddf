"""Calls a model with dual parameters (w0, Δw) and returns f(x; w0) and J(x) Δw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_map

from tangent_ops.errors import UnsupportedError
from tangent_ops.model.checkpointing import repeating
from tangent_ops.model.eval_caches import Kept
from tangent_ops.model.missing_formulas import naming_what_lacks
from tangent_ops.model.tree import lookup
from tangent_ops.ops.factored import Factors
from tangent_ops.ops.factored_calls import factored_calls
from tangent_ops.ops.forward_ad import fused_calls
from tangent_ops.ops.levels import in_own_level, in_transforms, is_compiling, refuse_other_levels

Directions = Mapping[str, Tensor | Factors]


class _LikeGradients(fused_calls):
    """Context in which tangents are off wherever the model switches gradients off.

    PyTorch's forward mode continues inside ``torch.no_grad()``: the value would have a tangent
    where it has no gradient. Gradients must be on at entry, since a ``no_grad()`` around the call
    cannot be distinguished from one in the model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return result


def dual_call(
    model: nn.Module,
    directions: Directions,
    kept: Kept,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    blocks: Sequence[nn.Module] = (),
) -> tuple[Any, Any]:
    """f(x; w0) and J(x) Δw, each shaped as the model's own output.

    Args:
        model: called with ``args`` and ``kwargs``.
        directions: Δw by parameter name, in any floating-point dtype, or its factors. Compiled code
            multiplies these out.
        kept: the model's caches.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        blocks: blocks to repeat in the backward pass (see
            :mod:`tangent_ops.model.checkpointing`); ignored inside another transform.
    """
    if is_compiling():
        weights, full = _paired(model, multiplied(model, directions))
        with fused_calls():
            return _jvp(model, weights, full, {}, args, kwargs)
    take_turn = in_own_level if peek_interpreter_stack() is None else in_transforms
    return take_turn(lambda: _in_turn(model, directions, kept, args, dict(kwargs), blocks))


def multiplied(model: nn.Module, directions: Directions) -> dict[str, Tensor]:
    """Δw by name, shaped as the model's parameters; factors are multiplied out."""
    return {
        n: d.product(lookup(model, n).shape) if isinstance(d, Factors) else d
        for n, d in directions.items()
    }


def _in_turn(model, directions, kept: Kept, args, kwargs, blocks) -> tuple[Any, Any]:
    factors = {n: d for n, d in directions.items() if isinstance(d, Factors)}
    full = {n: d for n, d in directions.items() if not isinstance(d, Factors)}
    weights, full = _paired(model, full | _unknown(model, factors))
    with contextlib.ExitStack() as stack:
        if not torch.is_grad_enabled():
            operands = (args, kwargs, weights, full, factors)
            args, kwargs, weights, full, factors = tree_map(_untracked, operands)
            stack.enter_context(torch.enable_grad())
        stack.enter_context(_LikeGradients())
        stack.enter_context(naming_what_lacks(model))
        if peek_interpreter_stack() is not None:
            return _jvp(model, weights, full, factors, args, kwargs, kept)
        # As torch.func.jvp, without the cost of wrapping every tensor. Like it, also where PyTorch
        # has switched forward mode off: in the forward method of a Function, as of a reentrant
        # checkpoint around the call.
        stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
        dual, trained = _duals(weights, full, factors)
        tangents = {n: factors[n].trained if n in factors else full[n] for n in weights}
        repeated = repeating(blocks, model, weights, tangents, factors, kept)
        with kept.nothing(), repeated, _recognising(weights, dual, factors, trained):
            return _unpack(functional_call(model, dual, args, kwargs))


def plain_dual_output(model: nn.Module, directions: Directions, args: tuple[Any, ...]) -> Any:
    """The model's dual output, in a plain ``dual_level()`` and the contexts of the caller."""
    factors = {n: d for n, d in directions.items() if isinstance(d, Factors)}
    full = {n: d for n, d in directions.items() if not isinstance(d, Factors)}
    weights, full = _paired(model, full | _unknown(model, factors))
    dual, trained = _duals(weights, full, factors)
    with _recognising(weights, dual, factors, trained):
        return functional_call(model, dual, args)


def _paired(model: nn.Module, directions: Mapping[str, Tensor]) -> tuple[Any, Any]:
    weights = {name: lookup(model, name) for name in directions}
    return weights, {n: d.to(weights[n].dtype) for n, d in directions.items()}


def _duals(weights, full, factors: Mapping[str, Factors]) -> tuple[Any, Any]:
    """What stands for the weights in the model, and zeros that have T as tangents."""
    dual = {n: forward_ad.make_dual(w, full[n]) for n, w in weights.items()}
    trained = {n: f.trained for n, f in factors.items()}
    return dual, {n: forward_ad.make_dual(torch.zeros_like(t), t) for n, t in trained.items()}


def _unknown(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Tangents of NaN, which show where a function is called that the factors do not reach."""
    made: dict[Any, Tensor] = {}
    found = {}
    for name in names:
        weight = lookup(model, name)
        kind = weight.shape, weight.stride(), weight.dtype, weight.device
        if kind not in made:
            made[kind] = torch.full_like(weight, torch.nan, requires_grad=False)
        found[name] = made[kind]
    return found


def _recognising(
    weights: Mapping[str, Tensor],
    stand_ins: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    trained: Mapping[str, Tensor],
) -> contextlib.AbstractContextManager[Any]:
    if not factors:
        return contextlib.nullcontext()
    return factored_calls(
        (stand_ins[n], weights[n], f._replace(trained=trained[n])) for n, f in factors.items()
    )


def _jvp(
    model, weights, directions, factors, args, kwargs, kept: Kept | None = None
) -> tuple[Any, Any]:
    def run(parameters, trained):
        if kept is None:
            return functional_call(model, parameters, args, dict(kwargs))
        refuse_other_levels()
        with kept.nothing(), _recognising(weights, parameters, factors, trained):
            return functional_call(model, parameters, args, dict(kwargs))

    trained = {n: f.trained for n, f in factors.items()}
    zeros = {n: torch.zeros_like(t) for n, t in trained.items()}
    primal, tangent, *_ = torch.func.jvp(run, (weights, zeros), (directions, trained))
    return primal, tangent


def _untracked(value: Any) -> Any:
    """The tensor, detached unless another transform tracks it, for a call without gradients."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    if is_functorch_wrapped_tensor(value) or forward_ad.unpack_dual(value).tangent is not None:
        return value
    return value.detach()


def _unpack(output: Any) -> tuple[Any, Any]:
    """Primal and tangent of every tensor in a model's output; an absent tangent is zero."""

    def tangent(x):
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if not isinstance(x, Tensor):
            raise UnsupportedError(
                f"the model returns a {type(x).__name__}, whose tensors cannot be found: return "
                "a tensor, or a tuple, list or dict of tensors"
            )
        found = forward_ad.unpack_dual(x).tangent
        return torch.zeros_like(x) if found is None else found

    primal = tree_map(
        lambda x: forward_ad.unpack_dual(x).primal if isinstance(x, Tensor) else x, output
    )
    return primal, tree_map(tangent, output)
