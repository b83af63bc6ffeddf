"""The Triton kernels' attention of plain and dual tensors of any leading shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.attention.autograd import value_and_tangent, value_by_rule
from tangent_ops.ops.backend import in_forward_ad
from tangent_ops.ops.levels import is_compiling

Optional = Tensor | None


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    unpack: bool,
) -> Tensor:
    """(..., H, N, Dv), dual if an operand is dual; the caller has checked the arguments.

    With ``unpack``, one pass computes value and tangent from unpacked operands. Otherwise the
    rule of an ``autograd.Function`` carries the tangents. See
    :func:`tangent_ops.ops.attention.path.decide`.
    """
    options = (query.shape[-1] ** -0.5 if scale is None else scale, dropout_p, is_causal)
    lead, operands = _with_heads(query, key, value, attn_mask, enable_gqa)
    seed = None
    if dropout_p > 0.0:
        # One seed per batch element gives vmap's randomness "same" and "different" their meaning.
        size = (lead[:-1].numel(),)
        seed = torch.randint(2**63 - 1, size, dtype=torch.int64, device=query.device)
    if not unpack:
        output = value_by_rule(operands, seed, options)
    else:
        pairs = [(None, None) if x is None else forward_ad.unpack_dual(x) for x in operands]
        primals, tangents = zip(*pairs, strict=True)
        if all(t is None for t in tangents):
            _refuse_hidden_duals()
        output, output_t = value_and_tangent(primals, seed, tangents, options)
        if any(t is not None for t in tangents):
            output = forward_ad.make_dual(output, output_t)
    return output if len(lead) == 2 else output.reshape(*lead, *output.shape[-2:])


def _refuse_hidden_duals() -> None:
    """Raise where tangents of a compiled function's inputs may be hidden from the operator.

    Needed for torch 2.11; later versions raise for such inputs themselves.
    """
    inside = is_compiling() and in_forward_ad()
    if inside and eager_transforms.JVP_NESTING == 0:
        raise UnsupportedError(
            "backend='triton': compiled code in a dual_level cannot see tangents of its inputs. "
            "Use torch.func.jvp inside the compiled function, or backend=None."
        )


def _with_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Optional, enable_gqa: bool
) -> tuple[torch.Size, tuple[Optional, ...]]:
    """The output's leading shape, and operands as (B, H, rows, cols), views where possible.

    The mask keeps size 1 where it is broadcast.
    """
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        leads = [query.shape[:-2]] * 3
        if query.ndim == 4 and mask is None:
            return leads[0], (query, key, value, None)
    elif enable_gqa:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
        leads = [torch.Size([*lead, x.shape[-3]]) for x in (query, key, value)]
    else:
        leads = [torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))] * 3

    def four(tensor: Tensor, lead: torch.Size) -> Tensor:
        if tensor.shape[:-2] != lead:
            tensor = tensor.expand(*lead, *tensor.shape[-2:])
        if len(lead) == 2:
            return tensor
        heads = lead[-1] if lead else 1
        return tensor.reshape(lead[:-1].numel(), heads, *tensor.shape[-2:])

    operands = [four(x, one) for x, one in zip((query, key, value), leads, strict=True)]
    if mask is not None:
        lead = leads[0]
        rank = max(len(lead), 2) + 2
        if mask.ndim < rank:
            mask = mask.reshape((1,) * (rank - mask.ndim) + tuple(mask.shape))
        if rank > 4:  # merge the batch axes; expand only if the mask varies along one
            outer = lead[:-1] if mask.shape[: rank - 3].numel() > 1 else mask.shape[: rank - 3]
            mask = mask.expand(*outer, *mask.shape[-3:]).flatten(0, rank - 4)
    return leads[0], (*operands, mask)
