"""The Triton attention kernels as torch operators with derivatives.

Two operators, each a fake and a batching rule beside its launch:

    tangent_ops::attention_jvp   q, k, v, q_t, k_t, v_t -> o, o_t, lse
    tangent_ops::attention_vjp   q, k, v, o, lse, grad  -> grad_q, grad_k, grad_v

Eager autograd goes through two ``autograd.Function`` around them, because an operator's
registered formula is dropped in silence by forward mode over forward mode. Under ``torch.compile``
the operator's registered formula is used, because Dynamo does not take a Function with a ``jvp``.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd.forward_ad import UnpackedDualTensor

from tangent_ops.errors import UnsupportedError
from tangent_ops.functional._backend import in_forward_ad, tangents_are_hidden

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 129, 8)


def why_not_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str | None:
    """Why the kernels cannot compute this call, in words for an error; None if they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not one of float16, bfloat16, float32"
    if query.shape[-1] not in HEAD_DIMS:
        return f"head_dim {query.shape[-1]} is not a multiple of 8 from 16 to 128"
    if value.shape[-1] != query.shape[-1]:
        return f"value's head_dim {value.shape[-1]} differs from query's {query.shape[-1]}"
    if query.shape[-3:-2] != key.shape[-3:-2]:
        return "grouped heads (enable_gqa) are not in the kernels yet"
    if attn_mask is not None:
        return "attn_mask is not in the kernels yet"
    if is_causal:
        return "is_causal=True is not in the kernels yet"
    if dropout_p > 0.0:
        return "dropout is not in the kernels yet"
    if tangents_are_hidden():
        return "jvp of grad and jvp of vmap are not in the kernels yet (grad and vmap of jvp are)"
    if torch.compiler.is_compiling() and eager_transforms.JVP_NESTING > 1:
        return "compiled forward mode over forward mode is not in the kernels yet"
    return None


def fused_attention(
    query: UnpackedDualTensor,
    key: UnpackedDualTensor,
    value: UnpackedDualTensor,
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and tangent, (..., H, N, D); None if no operand has a tangent."""
    if scale is None:
        scale = query.primal.shape[-1] ** -0.5
    primals = (query.primal, key.primal, value.primal)
    tangents = (query.tangent, key.tangent, value.tangent)
    lead = torch.broadcast_shapes(*(primal.shape[:-2] for primal in primals))
    operands = [None if x is None else _with_heads(x, lead) for x in (*primals, *tangents)]
    if torch.compiler.is_compiling():
        output, output_t, _ = attention_jvp(*operands, scale)
    else:
        output, output_t, _ = _AttentionJvp.apply(*operands, scale)
    if len(lead) != 2:
        output, output_t = (x.reshape(*lead, *x.shape[-2:]) for x in (output, output_t))
    return output, None if all(tangent is None for tangent in tangents) else output_t


def _with_heads(tensor: Tensor, lead: torch.Size) -> Tensor:
    """(..., N, D) as (B, H, N, D), a view where strides allow; ``lead`` is the broadcast "..."."""
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    if len(lead) == 2:
        return tensor
    heads = lead[-1] if lead else 1
    return tensor.reshape(lead[:-1].numel(), heads, *tensor.shape[-2:])


# --- operators -----------------------------------------------------------------------------


@torch.library.custom_op("tangent_ops::attention_jvp", mutates_args=())
def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tangent_kernels.attention.attention_jvp`."""
    from tangent_kernels import attention

    return attention.attention_jvp(query, key, value, query_t, key_t, value_t, scale)


@attention_jvp.register_fake
def _(query, key, value, query_t, key_t, value_t, scale):
    batch, heads, queries, dim = query.shape
    has_tangent = any(t is not None for t in (query_t, key_t, value_t))
    return (
        _empty_heads(query, batch, heads, queries, dim),
        _empty_heads(query, batch, heads, queries if has_tangent else 0, dim),
        query.new_empty(batch, heads, queries, dtype=torch.float32),
    )


@torch.library.custom_op("tangent_ops::attention_vjp", mutates_args=())
def attention_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tangent_kernels.attention.attention_vjp`."""
    from tangent_kernels import attention

    return attention.attention_vjp(
        query, key, value, output, lse, grad_output, scale, need_query, need_key, need_value
    )


@attention_vjp.register_fake
def _(query, key, value, output, lse, grad, scale, need_query, need_key, need_value):
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    return (
        _empty_heads(query, batch, heads, queries if need_query else 0, dim),
        _empty_heads(query, batch, heads, keys if need_key else 0, dim),
        _empty_heads(query, batch, heads, keys if need_value else 0, dim),
    )


def _empty_heads(like: Tensor, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _batching_rule(op):
    """Fold the mapped dimension into the batch: every row of the batch is independent."""

    def rule(info, in_dims, *args):
        def fold(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            mapped = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return mapped.flatten(0, 1)

        results = op(*(fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        unfolded = tuple(result.unflatten(0, (info.batch_size, -1)) for result in results)
        return unfolded, (0,) * len(unfolded)

    return rule


attention_jvp.register_vmap(_batching_rule(attention_jvp))
attention_vjp.register_vmap(_batching_rule(attention_vjp))


def _save(ctx, inputs, output):
    query, key, value, _, _, _, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[0], output[2])
    ctx.set_materialize_grads(False)
    # The output depends on no tangent. Unsaid, it would seem to, and the next layer would be asked
    # for gradients of its primal operands.
    frozen = not any(ctx.needs_input_grad[:3])
    ctx.mark_non_differentiable(*((output[0], output[2]) if frozen else (output[2],)))


def _backward(ctx, grad_output, grad_output_t, vjp):
    """Gradients of q, k, v through the value, and of their tangents through the tangent."""
    primal_needs, tangent_needs = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:6]
    if any(primal_needs) and grad_output_t is not None:
        _refuse("gradients of query, key and value through the output's tangent")
    if any(primal_needs) and in_forward_ad():
        # The saved primals carry no tangent, so the gradient's own tangent would be incomplete.
        _refuse(
            "gradients of query, key and value inside a forward-mode level (forward over "
            "reverse; for reverse over forward, call backward after leaving the level)"
        )

    def pull_back(needs, cotangent):
        if cotangent is None or not any(needs):
            return (None, None, None)
        grads = vjp(*ctx.saved_tensors, cotangent, ctx.scale, *needs)
        return (grad if need else None for need, grad in zip(needs, grads, strict=True))

    return (*pull_back(primal_needs, grad_output), *pull_back(tangent_needs, grad_output_t), None)


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"the Triton backend of scaled_dot_product_attention does not compute {what}; "
        "pass backend='reference', which does"
    )


def _backward_compiled(ctx, grad_output, grad_output_t, grad_lse):
    return _backward(ctx, grad_output, grad_output_t, attention_vjp)


attention_jvp.register_autograd(_backward_compiled, setup_context=_save)


# --- eager autograd --------------------------------------------------------------------------


class _AttentionJvp(torch.autograd.Function):
    """attention_jvp; its backward is the primal's VJP for values and for tangents alike."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, query_t, key_t, value_t, scale):
        return attention_jvp(query, key, value, query_t, key_t, value_t, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_output_t, grad_lse):
        return _backward(ctx, grad_output, grad_output_t, _AttentionVjp.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse("forward mode through this nesting (jvp of jvp, or jvp of grad)")


class _AttentionVjp(torch.autograd.Function):
    """attention_vjp, once differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, output, lse, grad, scale, need_query, need_key, need_value):
        return attention_vjp(
            query, key, value, output, lse, grad, scale, need_query, need_key, need_value
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        _refuse("the backward of its backward")

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse("forward mode through its backward (jvp of grad)")
