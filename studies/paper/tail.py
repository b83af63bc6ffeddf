"""The last blocks of a vision transformer that classifies by its class token, and no row more.

What the other tokens are after the last block is read by nobody, so the last block runs for the
class token alone. With a single query q and normed tokens X its attention needs no keys or values
of the other tokens either: for each head

    softmax(q (X W_kᵀ)ᵀ) (X W_vᵀ) = softmax((q W_k) Xᵀ) X W_vᵀ

The same function of the same weights, for an eighth of TAFT-1's work at 50 tokens. The biases of
keys drop out: they add the same to all logits of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ClassTokenBlock(nn.Module):
    """timm's pre-norm block for the class token alone: (B, N, D) -> (B, D).

    All its weights are in plain layers, which LoRA and Opacus know. A row to each head runs through
    `key` and `value`, though each head needs but its own part of them; that is little.

    Args:
        block: a `timm.models.vision_transformer.Block`; its parameters are copied.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attn
        width = attention.proj.in_features
        self.heads: int = attention.num_heads
        self.scale: float = (width // self.heads) ** -0.5
        self.norm1 = copy.deepcopy(block.norm1)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # transposed: of queries, not of tokens
        self.value = nn.Linear(width, width)
        with torch.no_grad():
            query, key, value = attention.qkv.weight.chunk(3)
            self.query.weight.copy_(query)
            self.key.weight.copy_(key.T)
            self.value.weight.copy_(value)
            self.query.bias.copy_(attention.qkv.bias[:width])
            self.value.bias.copy_(attention.qkv.bias[2 * width :])
        self.proj = copy.deepcopy(attention.proj)
        self.ls1 = copy.deepcopy(block.ls1)
        self.norm2 = copy.deepcopy(block.norm2)
        self.mlp = copy.deepcopy(block.mlp)
        self.ls2 = copy.deepcopy(block.ls2)
        own = torch.arange(width) // (width // self.heads) == torch.arange(self.heads)[:, None]
        self.register_buffer("own", own.float(), persistent=False)  # (heads, D): a head's part

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        query = self.query(normed[:, 0])[:, None] * self.own  # (B, heads, D)
        logits = self.key(query) @ normed.transpose(1, 2) * self.scale  # (B, heads, N)
        mixed = self.value(logits.softmax(dim=-1) @ normed)
        row = tokens[:, 0] + self.ls1(self.proj((mixed * self.own).sum(dim=1)))
        return row + self.ls2(self.mlp(self.norm2(row)))


class ClassTokenTail(nn.Module):
    """The last `depth` blocks, the norm and a new classifier of zeros: tokens -> logits.

    Args:
        model: timm's VisionTransformer with token pooling, without a classifier.
        depth: Blocks; 0 for norm and classifier.
        classes: Outputs.
    """

    def __init__(self, model: Any, depth: int, classes: int) -> None:
        super().__init__()
        blocks: Sequence[Any] = model.blocks[len(model.blocks) - depth :]
        self.blocks = nn.ModuleList(
            [*map(copy.deepcopy, blocks[:-1]), *map(ClassTokenBlock, blocks[-1:])]
        )
        self.norm = copy.deepcopy(model.norm)
        self.head = nn.Linear(model.num_features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """What enters the classifier."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))
