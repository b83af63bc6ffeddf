"""The last block of a class-token model, for the rows that are read and no others.

With class-token pooling nobody reads the other tokens after the last block. Queries, projection and
MLP run for the read rows alone, keys and values for all tokens. Where keys have no norm, they need
not be formed either: for the query q of one head, and normed tokens X,

    softmax(q (X W_kᵀ + b_k)ᵀ) (X W_vᵀ + b_v) = softmax((q W_k) Xᵀ) X W_vᵀ + b_v

b_k adds the same to all logits of a row, so its derivative is zero. Both forms compute what the
ordinary block computes, from the same parameters: slices of ``qkv.weight`` and ``qkv.bias``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent_ops.ops.linear import head_linear

_TIMM = "timm.models.vision_transformer."
_VIT = _TIMM + "VisionTransformer."
_DISTILLED = "timm.models.deit.VisionTransformerDistilled."
_ATTENTION = (
    "timm.layers.attention.Attention.forward",
    "tangent_ops.ops.nn.TangentAttention.forward",
)


def count_read_rows(model: nn.Module) -> int:
    """How many of the first tokens the head of a timm model reads; 0 if it may read others, too.

    1 is the class token, 2 are the class and distillation tokens. A model counts only if its
    ``forward_head`` and its last block are those of timm that this module knows.
    """
    head = _source(model, "forward_head")
    if head == _DISTILLED + "forward_head":
        rows = 2
    elif head == _VIT + "forward_head" and _source(model, "pool") == _VIT + "pool":
        pooled: Any = model
        rows = int(pooled.global_pool == "token" and pooled.attn_pool is None)
    else:
        return 0
    last: Any = model.blocks[-1]  # pyright: ignore[reportIndexIssue]
    return rows if why_not(last) is None else 0


def count_read_rows_of_calls(model: nn.Module) -> int:
    """As `count_read_rows`, for calls of the whole model.

    0 unless the whole forward pass is timm's own, and if a hook in the last block, on the model's
    norm or on the list of blocks would notice.
    """
    known = (_source(model, name).startswith(_VIT) for name in ("forward", "forward_features"))
    if not all(known):
        return 0
    parts: Any = model
    modules = (parts.blocks, *parts.blocks[-1].modules(), *parts.norm.modules())
    return 0 if any(map(_is_watched, modules)) else count_read_rows(model)


def why_not(block: nn.Module) -> str | None:
    """Why a block cannot run for some rows alone; None if it can."""
    if _source(block, "forward") not in _BLOCKS:
        return f"no form for {type(block).__name__}"
    for attention in _attentions(block):
        if _source(attention, "forward") not in _ATTENTION:
            return f"no form for {type(attention).__name__}"
    return None


@torch.no_grad()
def agrees(model: Any, rows: int) -> bool:
    """Whether the last block's form for the first rows changes nothing that enters the classifier.

    Compares it with the ordinary block on tokens of its own, and changes all other rows of the
    block's output. A classifier of zeros hides nothing: it does not run.

    Args:
        model: in eval mode, with ``count_read_rows(model) == rows``.
        rows: at least 1.
    """
    last = model.blocks[-1]
    weight = _attentions(last)[0].proj.weight
    shape = (2, rows + 4, len(weight))
    tokens = torch.arange(math.prod(shape), device=weight.device).sin().view(shape)
    try:
        with torch.autocast(weight.device.type, enabled=False):
            ordinary = last(tokens.to(weight.dtype))
            changed = ordinary.clone()
            changed[:, rows:] = 1 - 2 * ordinary[:, rows:]
            alone = run_block(form_of(last), last, tokens.to(weight.dtype), rows)
            expected, *found = (
                model.forward_head(model.norm(x), pre_logits=True)
                for x in (ordinary, changed, alone)
            )
    except (RuntimeError, TypeError, ValueError):  # it needs other tokens, or a head of its own
        return False
    return all(near(x, expected) for x in found)


def near(found: Tensor, expected: object) -> bool:
    """Whether two forms of one computation gave the same, but for rounding."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    device, dtype = expected.device.type, expected.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rounding = 4 * torch.finfo(dtype).eps
    scale = max(1e-4, rounding) * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=max(1e-3, rounding), atol=scale)


def forms_keys(block: nn.Module) -> bool:
    """Whether the block needs the keys of all tokens: they have a norm."""
    return any(not isinstance(a.k_norm, nn.Identity) for a in _attentions(block))


Form = Callable[[Any, Tensor, int], Tensor]


def form_of(block: nn.Module) -> Form:
    """The form of a block for which `why_not` returns None. Dynamo cannot trace this look-up."""
    return _BLOCKS[_source(block, "forward")]


def run_block(form: Form, block: nn.Module, tokens: Tensor, rows: int) -> Tensor:
    """The block's output for the first tokens alone, if nothing watches or replaces its parts.

    Hooks on the block or its attention, and a replaced ``forward`` (checkpointing), get the
    ordinary call. Hooks on layers inside see the rows that are computed.

    Args:
        form: the block's (`form_of`).
        block: a block for which `why_not` returns None.
        tokens: (B, N, D).
        rows: at most N.

    Returns:
        (B, rows, D), or (B, N, D) from the ordinary call.
    """
    if any(_is_watched(module) for module in (block, *_attentions(block))):
        return block(tokens)
    return form(block, tokens, rows)


@contextlib.contextmanager
def reading_rows(model: nn.Module, rows: int) -> Iterator[None]:
    """Context in which the last block of a whole model returns the first rows alone.

    Args:
        model: with ``count_read_rows_of_calls(model) == rows``.
        rows: at least 1.
    """
    last: Any = model.blocks[-1]  # pyright: ignore[reportIndexIssue]
    run = form_of(last)
    last.forward = lambda tokens: run(last, tokens, rows)
    try:
        yield
    finally:
        del last.forward  # the instance's: the class has its own


def _pre_norm(block: Any, tokens: Tensor, rows: int) -> Tensor:
    x = tokens[:, :rows]
    x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens), rows)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _post_norm(block: Any, tokens: Tensor, rows: int) -> Tensor:
    x = tokens[:, :rows]
    x = x + block.drop_path1(block.norm1(_attend(block.attn, tokens, rows)))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _parallel(block: Any, tokens: Tensor, rows: int) -> Tensor:
    attended = (p.drop_path(p.ls(_attend(p.attn, p.norm(tokens), rows))) for p in block.attns)
    x = tokens[:, :rows] + sum(attended)
    return x + sum(ffn(x) for ffn in block.ffns)


_BLOCKS = {
    _TIMM + "Block.forward": _pre_norm,
    _TIMM + "ResPostBlock.forward": _post_norm,
    _TIMM + "ParallelThingsBlock.forward": _parallel,
}


def _attend(attention: Any, tokens: Tensor, rows: int) -> Tensor:
    """timm's Attention for the first rows: (B, N, D) -> (B, rows, D)."""
    read = tokens[:, :rows]
    layer = attention.qkv
    if type(layer) is not nn.Linear or _is_watched(layer):
        x = _with_layer(attention, tokens, rows)
    elif isinstance(attention.k_norm, nn.Identity):
        x = _absorbed(attention, tokens, rows)
    else:
        x = _with_keys(attention, tokens, rows)
    x = attention.norm(x.flatten(-2))
    gate = getattr(attention, "gate", None)
    x = x if gate is None else x * gate(read).sigmoid()
    return attention.proj_drop(attention.proj(x))


def _with_layer(attention: Any, tokens: Tensor, rows: int) -> Tensor:
    """Queries, keys and values by the layer itself, which is no plain one: (B, rows, H, K)."""
    query, key, value = _split(attention.qkv(tokens), 3, attention.num_heads).unbind(2)
    query = attention.q_norm(query[:, :rows])
    return _dot_product_attention(attention, query, attention.k_norm(key), value)


def _with_keys(attention: Any, tokens: Tensor, rows: int) -> Tensor:
    """Queries of the read rows, keys and values of all tokens: (B, rows, H, K)."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = len(weight) // 3
    pairs = F.linear(tokens, weight[inner:], None if bias is None else bias[inner:])
    key, value = _split(pairs, 2, attention.num_heads).unbind(2)
    query = _query(attention, tokens[:, :rows])
    return _dot_product_attention(attention, query, attention.k_norm(key), value)


def _absorbed(attention: Any, tokens: Tensor, rows: int) -> Tensor:
    """The form without keys and values, for one row to each head: (B, rows, H, K)."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    heads, inner = attention.num_heads, len(weight) // 3
    width = inner // heads
    key, value = (part.view(heads, width, -1) for part in weight[inner:].chunk(2))  # (H, K, D)
    query = _query(attention, tokens[:, :rows]) * attention.scale
    logits = head_linear(query, key.mT).flatten(1, 2) @ tokens.mT  # (B, rows * H, N)
    mixed = attention.attn_drop(logits.softmax(dim=-1)) @ tokens
    shift = None if bias is None else bias[2 * inner :].view(heads, width)
    return head_linear(mixed.view(len(mixed), rows, heads, mixed.shape[-1]), value, shift)


def _query(attention: Any, read: Tensor) -> Tensor:
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = len(weight) // 3
    query = F.linear(read, weight[:inner], None if bias is None else bias[:inner])
    return attention.q_norm(_split(query, attention.num_heads))


def _split(tensor: Tensor, *sizes: int) -> Tensor:
    """The last dimension in these sizes and one more. Dynamo of torch 2.11 lacks `unflatten`."""
    return tensor.view(*tensor.shape[:-1], *sizes, tensor.shape[-1] // math.prod(sizes))


def _dot_product_attention(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dropout = attention.attn_drop.p if attention.training else 0.0
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, scale=attention.scale
    ).transpose(1, 2)


def _attentions(block: Any) -> list[Any]:
    if hasattr(block, "attns"):
        return [part.attn for part in block.attns]
    return [block.attn] if hasattr(block, "attn") else []


def _source(module: nn.Module, method: str) -> str:
    """Where a module's method is defined; "" if the instance replaces it or has none."""
    own = getattr(type(module), method, None)
    if own is None or method in module.__dict__:
        return ""
    return f"{own.__module__}.{own.__qualname__}"


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks or a replaced ``forward`` see the module's calls."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(map(len, hooks)) or "forward" in module.__dict__
