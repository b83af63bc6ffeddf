"""One call of a model whose parameters are dual: (w0, Δw) in, value and JΔw out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
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
from tangent_ops.ops.forward_ad import fused_calls
from tangent_ops.ops.levels import in_own_level, in_transforms, is_compiling, refuse_other_levels


class _LikeGradients(fused_calls):
    """Where the model switches gradients off (``torch.no_grad()``), tangents are off, too.

    PyTorch's forward mode goes on there: the value would have a derivative without a gradient. The
    call has to begin with gradients on: what is off then cannot be told from what the model does.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return result


def dual_call(
    model: nn.Module,
    directions: Mapping[str, Tensor],
    kept: Kept,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    blocks: Sequence[nn.Module] = (),
) -> tuple[Any, Any]:
    """f(x; w0) and J(x) Δw, each shaped as the model's own output.

    Args:
        model: called with ``args`` and ``kwargs``.
        directions: Δw by parameter name; of any floating-point dtype.
        kept: of the model.
        args: of the call.
        kwargs: of the call.
        blocks: those of the model that are repeated in the backward pass (see
            :mod:`tangent_ops.model.checkpointing`); they are not, inside another transform.
    """
    if is_compiling():
        weights, directions = _paired(model, directions)
        with fused_calls():
            return _jvp(model, weights, directions, args, kwargs)
    take_turn = in_own_level if peek_interpreter_stack() is None else in_transforms
    return take_turn(lambda: _in_turn(model, directions, kept, args, dict(kwargs), blocks))


def _in_turn(model, directions, kept: Kept, args, kwargs, blocks) -> tuple[Any, Any]:
    weights, directions = _paired(model, directions)
    with contextlib.ExitStack() as stack:
        if not torch.is_grad_enabled():
            operands = (args, kwargs, weights, directions)
            args, kwargs, weights, directions = tree_map(_untracked, operands)
            stack.enter_context(torch.enable_grad())
        stack.enter_context(_LikeGradients())
        stack.enter_context(naming_what_lacks(model))
        if peek_interpreter_stack() is not None:
            return _jvp(model, weights, directions, args, kwargs, kept)
        # The same as torch.func.jvp, without the cost of wrapping every tensor.
        dual = {n: forward_ad.make_dual(w, directions[n]) for n, w in weights.items()}
        with kept.nothing(), repeating(blocks, model, dual, kept):
            return _unpack(functional_call(model, dual, args, kwargs))


def _paired(model: nn.Module, directions: Mapping[str, Tensor]) -> tuple[Any, Any]:
    weights = {name: lookup(model, name) for name in directions}
    return weights, {n: d.to(weights[n].dtype) for n, d in directions.items()}


def _jvp(model, weights, directions, args, kwargs, kept: Kept | None = None) -> tuple[Any, Any]:
    def run(parameters):
        if kept is None:
            return functional_call(model, parameters, args, dict(kwargs))
        refuse_other_levels()
        with kept.nothing():
            return functional_call(model, parameters, args, dict(kwargs))

    primal, tangent, *_ = torch.func.jvp(run, (weights,), (directions,))
    return primal, tangent


def _untracked(value: Any) -> Any:
    """A tensor without its history, for a call without gradients; not one of another transform."""
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
                f"the model returns a {type(x).__name__}, whose tensors cannot be found: let it "
                "return a tensor, or a tuple, list or dict of tensors"
            )
        found = forward_ad.unpack_dual(x).tangent
        return torch.zeros_like(x) if found is None else found

    primal = tree_map(
        lambda x: forward_ad.unpack_dual(x).primal if isinstance(x, Tensor) else x, output
    )
    return primal, tree_map(tangent, output)
