"""Modules to put into an existing vision transformer by hand."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.functional import scaled_dot_product_attention

# What timm's Attention is made of; the norms are Identity and the gate None where unused.
_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class TangentAttention(nn.Module):
    """Multi-head self-attention as timm's ``Attention``, for plain and dual inputs.

    It has timm's parameter names, so state dicts go both ways. A plain input in ordinary training
    runs PyTorch's attention; a dual input, inside ``torch.func.jvp`` or a dual level, runs the
    fused one, and needs no :class:`tangent_ops.fused_forward_ad`.

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
        """Take over a ``timm.layers.Attention``: its submodules are shared, not copied.

        Example:
            >>> for block in vit.blocks:
            ...     block.attn = TangentAttention.from_timm(block.attn)

        Raises:
            UnsupportedError: ``attn`` computes something else than timm's Attention does, or has
                a part that this module would ignore.
        """
        from timm.layers.attention import (
            Attention,
        )  # here, so that tangent_ops imports without timm

        if type(attn).forward is not Attention.forward:
            problem = "its forward is another one"
        else:
            parts = (attn.named_parameters(recurse=False), attn.named_buffers(recurse=False))
            own = {name for kind in parts for name, _ in kind}
            own |= {name for name, _ in attn.named_children() if name not in _PARTS}
            problem = f"its {', '.join(sorted(own))} would be lost" if own else None
        if problem:
            raise UnsupportedError(
                f"{type(attn).__name__} is no plain timm.layers.Attention: {problem}. "
                "Leave the module as it is and use tangent_ops.fused_forward_ad()."
            )
        num_heads = int(attn.num_heads)  # pyright: ignore[reportArgumentType]
        module = cls(num_heads, num_heads)
        for name in _PARTS:
            if hasattr(attn, name):
                setattr(module, name, getattr(attn, name))
        module.scale = float(attn.scale)  # pyright: ignore[reportArgumentType]
        module.train(attn.training)
        return module

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: (B, N, dim) tokens, plain or dual.
            attn_mask: as for :func:`tangent_ops.scaled_dot_product_attention`.
            is_causal: likewise.

        Returns:
            (B, N, dim).
        """
        query, key, value = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        out = scaled_dot_product_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        out = self.norm(rearrange(out, "b h n d -> b n (h d)"))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))
