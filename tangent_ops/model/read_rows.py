"""The last block of a vision transformer, computed for the rows that the head reads.

With class-token pooling nobody reads the other tokens after the last block. So its queries,
projection and MLP run for the class token alone. For a query q of a head h and normed tokens X,

    softmax(q (X W_kᵀ)ᵀ) (X W_vᵀ) = softmax((q W_k) Xᵀ) X W_vᵀ

so if keys are neither normed nor rotated, keys and values need a row to each head, too, in place of
a row to each token. The biases of keys add the same to all logits of a row, and drop out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from tangent_ops.ops.linear import head_linear
from tangent_ops.ops.nn import TangentAttention

Hook = TypeVar("Hook", bound=Callable[..., Any])


def rows_read(model: Any) -> int:
    """How many of the first rows `model.forward_head` reads; 0 for all, or if that is unknown."""
    if (
        not _is_timms(model)
        or getattr(model, "global_pool", None) != "token"
        or getattr(model, "attn_pool", None)
    ):
        return 0
    if getattr(model, "cls_token", None) is None:
        return 0
    return 1 + (getattr(model, "dist_token", None) is not None)


def first_rows(block: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """`block(tokens)[:, :count]`, for fewer operations if `why_not` gives None.

    Args:
        block: of a transformer.
        tokens: (B, N, D).
        count: R.

    Returns:
        (B, R, D).
    """
    if why_not(block) is not None:
        return block(tokens)[:, :count]
    return _first_rows(block, tokens, count)


@contextlib.contextmanager
def reading_rows(model: Any) -> Iterator[None]:
    """Context in which the last block of timm's vision transformer computes the read rows alone.

    It has no effect on a model whose own methods, or hooks, may read the others.
    """
    count = rows_read(model)
    if not count or _sees_rows(model) or why_not(block := model.blocks[-1]) is not None:
        yield
        return

    def forward(tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal:
            return _first_rows(block, tokens, count)
        return type(block).forward(block, tokens, attn_mask, is_causal)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _is_timms(model: Any) -> bool:
    """Whether the model's methods after the last block are timm's."""
    from timm.models import deit, vision_transformer

    kinds = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled)
    own = ("forward", "forward_features", "forward_head", "pool")
    timms = any(all(getattr(type(model), n, None) is getattr(k, n) for n in own) for k in kinds)
    return timms and not any(name in vars(model) for name in own)


def _sees_rows(model: Any) -> bool:
    """Whether a hook sees what the last block returns."""
    return any(map(_has_hooks, (model, model.blocks, model.norm, model.fc_norm)))


def _first_rows(block: Any, tokens: Tensor, count: int) -> Tensor:
    rows = tokens[:, :count]
    rows = rows + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens), count)))
    return rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows))))


def why_not(block: nn.Module) -> str | None:
    """Why a block is computed for all rows; None for timm's pre-norm block as it is.

    Layers of attention that were replaced, by LoRA's for example, and layers with hooks, as
    per-sample gradients set them, must run as modules.
    """
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    attention = getattr(block, "attn", None)
    if type(block) is not Block or "forward" in vars(block):
        return f"its block is a {type(block).__name__}"
    if type(attention) not in (Attention, TangentAttention) or "forward" in vars(attention):
        return f"its attention is a {type(attention).__name__}"
    linear = [getattr(attention, name) for name in ("qkv", "proj")]
    if any(type(layer) is not nn.Linear or "forward" in vars(layer) for layer in linear):
        return "a layer of its attention was replaced"
    hooked = [name for name, module in block.named_modules() if _has_hooks(module)]
    return f"{hooked[0] or 'its block'} has hooks" if hooked else None


def _attend(attention: Any, tokens: Tensor, count: int) -> Tensor:
    heads, rows = attention.num_heads, tokens[:, :count]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = len(weight) // 3
    query = F.linear(rows, weight[:width], None if bias is None else bias[:width])
    query = attention.q_norm(query.unflatten(-1, (heads, -1)))  # (B, R, H, d)
    if isinstance(attention.k_norm, nn.Identity):
        of_key, of_value = (w.unflatten(0, (heads, -1)) for w in weight[width:].chunk(2))
        own = None if bias is None else bias[2 * width :].unflatten(0, (heads, -1))
        asked = head_linear(query, of_key.mT).flatten(1, 2)  # (B, R H, D)
        weights = (asked * attention.scale @ tokens.mT).softmax(-1)
        mixed = (attention.attn_drop(weights) @ tokens).unflatten(1, (count, heads))
        out = head_linear(mixed, of_value, own)
    else:
        pair = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
        key, value = pair.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        key, query = attention.k_norm(key), query.transpose(1, 2)
        dropped = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropped, scale=attention.scale
        )
        out = out.transpose(1, 2)
    out = attention.norm(out.flatten(2))
    gate = getattr(attention, "gate", None)
    out = out if gate is None else out * gate(rows).sigmoid()
    return attention.proj_drop(attention.proj(out))


def for_any_rows(hook: Hook) -> Hook:
    """Mark a module's hook: it may see fewer rows, and layers that are not called."""
    hook.any_rows = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


def _has_hooks(module: nn.Module) -> bool:
    kept = (value for name, value in vars(module).items() if "_hooks" in name)
    hooks = (hook for value in kept if isinstance(value, dict) for hook in value.values())
    return any(callable(hook) and not getattr(hook, "any_rows", False) for hook in hooks)
