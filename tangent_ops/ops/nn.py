"""An attention module for dual inputs, to replace timm's in a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.ops.attention.api import scaled_dot_product_attention

# The parts of timm's Attention; an unused norm is Identity and an unused gate None.
_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class TangentAttention(nn.Module):
    """Multi-head self-attention as timm's ``Attention``, for plain and dual inputs.

    It has timm's parameter names, so each loads the other's state dict. PyTorch's attention
    computes plain inputs. The fused attention computes dual inputs, inside ``torch.func.jvp`` or a
    dual level, without :class:`tangent_ops.fused_forward_ad`.

    Args:
        dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: number of attention heads.
        qkv_bias: give the query, key and value projection a bias.
        proj_bias: give the output projection a bias.
        attn_drop: dropout probability of the attention weights in training.
        proj_drop: dropout probability of the output in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ArgumentError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.ignores_mask_if_causal = False
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm: nn.Module = nn.Identity()
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_timm(cls, attn: nn.Module) -> TangentAttention:
        """Make the module from a ``timm.layers.Attention``, whose submodules are shared.

        Parameters, their order, modes and values are the original's, with one exception: a query
        whose keys are all masked gives 0, where timm gives NaN if its ``fused_attn`` is False.

        Example:
            >>> for block in vit.blocks:
            ...     block.attn = TangentAttention.from_timm(block.attn)

        Raises:
            UnsupportedError: ``attn`` does not compute what timm's Attention does, or has a part
                that this module would ignore.
        """
        problem = _why_not_plain(attn)
        if problem:
            raise UnsupportedError(
                f"{type(attn).__name__} is no plain timm.layers.Attention: {problem}. "
                "Leave the module as it is and use tangent_ops.fused_forward_ad()."
            )
        module = cls.__new__(cls)  # without drawing random weights
        nn.Module.__init__(module)
        for name in ("num_heads", "training"):
            setattr(module, name, getattr(attn, name))
        fused, scale, head_dim = attn.fused_attn, attn.scale, attn.head_dim
        module.scale = float(head_dim**-0.5 if fused else scale)  # pyright: ignore
        module.ignores_mask_if_causal = not fused
        module.gate = None  # older versions of timm have none
        for name, part in attn._modules.items():
            setattr(module, name, part)
        return module

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: (B, N, dim) tokens, plain or dual.
            attn_mask: as for :func:`tangent_ops.scaled_dot_product_attention`.
            is_causal: likewise; after :meth:`from_timm` of a module whose ``fused_attn`` is False
                it overrides ``attn_mask``, as in timm.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: as :func:`tangent_ops.scaled_dot_product_attention`.
        """
        qkv = self.qkv(x)
        # Dynamo of torch 2.11 does not trace `unflatten` in `fused_forward_ad()`.
        width = qkv.shape[2] // (3 * self.num_heads)
        qkv = qkv.view(x.shape[0], x.shape[1], 3, self.num_heads, width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = _attend(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask,
            self.attn_drop.p if self.training else 0.0,
            is_causal,
            self.scale,
            self.ignores_mask_if_causal,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


@torch.fx.wrap  # its checks read values, which a symbolic trace does not have
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    ignores_mask_if_causal: bool,
) -> Tensor:
    if is_causal and ignores_mask_if_causal:
        attn_mask = None
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )


def _why_not_plain(attn: nn.Module) -> str | None:
    """What TangentAttention would compute differently or lose; None if nothing."""
    from timm.layers.attention import Attention  # here, so that tangent_ops imports without timm

    # Also find a forward that was set on the instance.
    if getattr(attn.forward, "__func__", None) is not Attention.forward:
        return "its forward is another one"
    parts = (attn.named_parameters(recurse=False), attn.named_buffers(recurse=False))
    own = {name for kind in parts for name, _ in kind} | (attn._modules.keys() - _PARTS)
    own |= set(_hooks(attn))
    if own:
        return f"its {', '.join(sorted(own))} would be lost"
    # timm calls this part if it is not fused; this module reads only its probability.
    drop: Any = attn.attn_drop
    if not attn.fused_attn and (type(drop) is not nn.Dropout or _hooks(drop)):
        return f"its attn_drop, a {type(drop).__name__} or with hooks, would not be called"
    return None


def _hooks(module: Any) -> list[str]:
    return [name.strip("_") for name, value in vars(module).items() if "_hooks" in name and value]
