"""Registers the Triton attention kernels as torch operators, with fake kernels and vmap rules.

    tangent_ops::attention_jvp          operands, R tangents        -> o, o_t, lse, mu
    tangent_ops::attention_vjp          operands, R cotangents      -> R gradients of each operand
    tangent_ops::attention_second_vjp   operands, R tangents,       -> gradients of operands
                                        cotangents of o and o_t        and of tangents

Shapes are those of :mod:`tangent_kernels.attention`: (B, H, N, D), with R in front for one per
tangent; a mask has size 1 where it is broadcast. A result that is not needed has shape (0,).

Derivatives are in :mod:`tangent_ops.ops.attention.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

_C: Any = torch._C
_PLAIN = (Tensor, nn.Parameter)

# --- operators -----------------------------------------------------------------------------


def _launch_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    mask_t: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tangent_kernels.attention.attention_jvp`."""
    from tangent_kernels import attention

    operands = (query, key, value, mask, seed, query_t, key_t, value_t, mask_t)
    return attention.run_jvp(operands, (scale, dropout_p, is_causal, None))


def _launch_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tangent_kernels.attention.attention_vjp`; ``needs`` is for q, k, v, mask."""
    from tangent_kernels import attention

    operands = (query, key, value, mask, seed, output, lse, grad_output)
    found = attention.run_vjp(operands, (scale, dropout_p, is_causal, None), needs)
    query_grad, key_grad, value_grad, mask_grad = _filled(query, found)
    return query_grad, key_grad, value_grad, mask_grad


def _launch_second_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    mask_t: Tensor | None,
    output: Tensor,
    output_t: Tensor,
    lse: Tensor,
    mu: Tensor,
    grad_output: Tensor | None,
    grad_output_t: Tensor,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tangent_kernels.attention.attention_second_vjp`.

    ``needs`` and the results are for q, k, v, mask and then for their tangents.
    """
    from tangent_kernels import attention

    operands = (query, key, value, mask, seed, query_t, key_t, value_t, mask_t)
    results = (output, output_t, lse, mu, grad_output, grad_output_t)
    primal, tangent = attention.run_second_vjp(
        (*operands, *results), (scale, dropout_p, is_causal, None), needs
    )
    q, k, v, b, q_t, k_t, v_t, b_t = _filled(query, (*primal, *tangent))
    return q, k, v, b, q_t, k_t, v_t, b_t


def _operator(name: str, launch: Callable[..., Any]) -> Any:
    return torch.library.custom_op(f"tangent_ops::{name}", launch, mutates_args=())


attention_jvp = _operator("attention_jvp", _launch_jvp)
attention_vjp = _operator("attention_vjp", _launch_vjp)
attention_second_vjp = _operator("attention_second_vjp", _launch_second_vjp)


# --- launches without the operator ---------------------------------------------------------


def run_jvp(*args: Any) -> tuple[Tensor, ...]:
    """``attention_jvp`` of tensors without derivatives."""
    return (_launch_jvp if _is_unobserved(args) else attention_jvp)(*args)


def run_vjp(*args: Any) -> tuple[Tensor, ...]:
    """``attention_vjp`` of tensors without derivatives."""
    return (_launch_vjp if _is_unobserved(args) else attention_vjp)(*args)


def run_second_vjp(*args: Any) -> tuple[Tensor, ...]:
    """``attention_second_vjp`` of tensors without derivatives."""
    return (_launch_second_vjp if _is_unobserved(args) else attention_second_vjp)(*args)


def _is_unobserved(args: Sequence[Any]) -> bool:
    """Whether nothing in PyTorch would see the operator's call: its dispatcher takes 70 µs.

    Modes, traces, transforms, tensor subclasses and profilers see operators, not launches.
    """
    return (
        peek_interpreter_stack() is None
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not _C._autograd._profiler_enabled()
        and _C._get_tracing_state() is None
        and all(type(x) in _PLAIN or not isinstance(x, Tensor) for x in args)
    )


def _filled(like: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in gradients]


# --- fake kernels --------------------------------------------------------------------------


@attention_jvp.register_fake
def _(query, key, value, mask, seed, query_t, key_t, value_t, mask_t, *options):
    batch, heads, queries, _ = query.shape
    tangents = (query_t, key_t, mask_t, value_t)
    count = next((t.shape[0] for t in tangents if t is not None), 0)
    moved = count if any(t is not None for t in tangents[:3]) else 0
    dim = value.shape[-1]
    return (
        empty_heads(query, batch, heads, queries, dim),
        empty_heads(query, count, batch, heads, queries, dim),
        query.new_empty(batch, heads, queries, dtype=torch.float32),
        query.new_empty(moved, batch, heads, queries, dtype=torch.float32),
    )


@attention_vjp.register_fake
def _(query, key, value, mask, seed, output, lse, grad_output, scale, dropout_p, causal, needs):
    return tuple(_fake_gradients((query, key, value, mask), needs, (grad_output.shape[0],)))


@attention_second_vjp.register_fake
def _(query, key, value, mask, seed, query_t, key_t, value_t, mask_t, output, output_t, *rest):
    operands, needs = (query, key, value, mask), rest[-1]
    primal = _fake_gradients(operands, needs[:4], ())
    return (*primal, *_fake_gradients(operands, needs[4:], (output_t.shape[0],)))


def _fake_gradients(operands, needs, lead) -> list[Tensor]:
    query, *_, mask = operands
    fakes = [
        empty_heads(x, *lead, *x.shape) if need else query.new_empty(0)
        for x, need in zip(operands[:3], needs, strict=False)
    ]
    return [*fakes, mask.new_empty(*lead, *mask.shape) if needs[3] else query.new_empty(0)]


def empty_heads(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (..., H, N, D), laid out as (..., N, H, D) so that merging heads is a view.

    The result is not a view: a view that a Function returns cannot be changed in place.
    """
    *lead, heads, rows, dim = range(len(shape))
    order = (*lead, rows, heads, dim)
    return torch.empty_permuted(shape, order, dtype=dtype or like.dtype, device=like.device)


# --- batching rules ------------------------------------------------------------------------
# A mapped dimension of only tangents (or cotangents) becomes R, so that the kernels load the primal
# and compute its softmax once. Otherwise it joins the batch.

# The batch axis of each leading argument: 0, or 1 after R.
_PRIMAL = (0, 0, 0, 0, 0)  # query, key, value, mask, seed
_JVP = (*_PRIMAL, 1, 1, 1, 1)
_VJP = (*_PRIMAL, 0, 0, 1)
_SECOND = (*_JVP, 0, 1, 0, 1, 0, 1)


def batched_jvp(call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """The batching rule of ``attention_jvp`` and of functions with the same arguments."""
    size = info.batch_size
    if all(dim is None for dim in in_dims[:5]):
        tangents = [_stacked(x, dim, size) for x, dim in zip(args[5:9], in_dims[5:9], strict=True)]
        output, output_t, lse, mu = call(*args[:5], *tangents, *args[9:])
        return (output, _unstacked(output_t, size), lse, _unstacked(mu, size)), (None, 0, None, 0)
    output, output_t, lse, mu = call(*_folded(args, in_dims, _JVP, size))
    unfolded = (_unfolded(x, i % 2, size) for i, x in enumerate((output, output_t, lse, mu)))
    return tuple(unfolded), (0, 1, 0, 1)


def batched_vjp(call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """The batching rule of ``attention_vjp``."""
    size, mask = info.batch_size, args[3]
    if all(dim is None for dim in in_dims[:7]):
        found = call(*args[:7], _stacked(args[7], in_dims[7], size), *args[8:])
        return _dims([_unstacked(x, size) if x.numel() else None for x in found], found, 0)
    found = call(*_folded(args, in_dims, _VJP, size))
    grads = _unfolded_gradients(found, 1, size, mask, in_dims[3])
    return _dims(grads, found, 1)


def batched_second_vjp(
    call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any
) -> Any:
    """The batching rule of ``attention_second_vjp``."""
    size, mask = info.batch_size, args[3]
    found = call(*_folded(args, in_dims, _SECOND, size))
    primal = _unfolded_gradients(found[:4], 0, size, mask, in_dims[3])
    tangent = _unfolded_gradients(found[4:], 1, size, mask, in_dims[3])
    primal, primal_dims = _dims(primal, found[:4], 0)
    tangent, tangent_dims = _dims(tangent, found[4:], 1)
    return (*primal, *tangent), (*primal_dims, *tangent_dims)


def _stacked(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(R, ...) with a mapped dimension as (size * R, ...)."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _unstacked(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _folded(args: Sequence[Any], in_dims: Sequence[Any], axes: Sequence[int], size: int) -> list:
    """Every operand with the mapped dimension, and the batch, as one axis."""
    query, in_dim = args[0], in_dims[0]
    batch = (query if in_dim is None else query.movedim(in_dim, 0)[0]).shape[0]
    folded = list(args)
    for i, axis in enumerate(axes):
        if not isinstance(args[i], Tensor):
            continue
        if in_dims[i] is None:
            shape = list(args[i].shape)
            mapped = args[i].unsqueeze(axis).expand(*shape[:axis], size, *shape[axis:])
        else:
            mapped = args[i].movedim(in_dims[i], axis)
        shape = list(mapped.shape)
        shape[axis + 1] = batch  # a mask or seed may have size 1
        folded[i] = mapped.expand(shape).flatten(axis, axis + 1)
    return folded


def _unfolded(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])


def _unfolded_gradients(
    found: Sequence[Tensor], axis: int, size: int, mask: Tensor | None, mask_dim: int | None
) -> list[Tensor | None]:
    grads = [_unfolded(x, axis, size) if x.numel() else None for x in found]
    if mask is not None and grads[3] is not None:
        shape = (mask if mask_dim is None else mask.movedim(mask_dim, 0)[0]).shape
        if shape[0] == 1:  # the batch it was expanded over
            grads[3] = grads[3].sum(axis + 1, keepdim=True)
    return grads


def _dims(
    grads: Sequence[Tensor | None], found: Sequence[Tensor], axis: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Results and the axes of their mapped dimension, None for results that are not needed."""
    results = tuple(one if grad is None else grad for grad, one in zip(grads, found, strict=True))
    return results, tuple(None if grad is None else axis for grad in grads)


def _register(op: Any, rule: Callable[..., Any]) -> None:
    op.register_vmap(lambda info, in_dims, *args: rule(op, info, in_dims, *args))


_register(attention_jvp, batched_jvp)
_register(attention_vjp, batched_vjp)
_register(attention_second_vjp, batched_second_vjp)
