"""A small diffusion transformer (DiT) in plain PyTorch, for the example of MeanFlow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EARLIEST = 0.05  # u divides by t, but by no less than this
FREQUENCIES = 32  # of the embedding of a time, from 1 to 50 radians per unit of time


class Block(nn.Module):
    """Attention and MLP, whose norms are shifted, scaled and gated by the condition (adaLN-zero).

    Args:
        dim: Width of the tokens, a multiple of ``heads``.
        heads: Number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, dim) tokens and (B, dim) conditions to (B, N, dim)."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(2))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(y)


class DiT(nn.Module):
    """The average velocity u(z, r, t) of grey images of a class.

    The last layer predicts the image x, and u = (z - x) / t (Li, He: "Back to Basics: Let Denoising
    Generative Models Denoise", 2025): a small network need not carry the noise to its output.

    Args:
        size: Side of the images in pixels, a multiple of ``patch``.
        patch: Side of a token in pixels.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads.
        classes: Number of classes.
    """

    def __init__(
        self,
        size: int = 28,
        patch: int = 7,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.size, self.patch = size, patch
        self.embed = nn.Linear(patch * patch, dim)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, dim) * 0.02)
        self.label = nn.Embedding(classes, dim)
        self.time = nn.Sequential(nn.Linear(4 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch * patch)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.frequencies: Tensor
        steps = torch.linspace(0, math.log(50), FREQUENCIES)
        self.register_buffer("frequencies", steps.exp(), persistent=False)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Compute u.

        Args:
            z: (B, 1, size, size), images at time t.
            r: (B,), the earlier time, in [0, t].
            t: (B,), in [0, 1]; at 1 an image is noise.
            labels: (B,) int64.

        Returns:
            (B, 1, size, size).
        """
        count, grid, p = len(z), self.size // self.patch, self.patch
        tokens = z.view(count, grid, p, grid, p).transpose(2, 3).reshape(count, grid * grid, p * p)
        x = self.embed(tokens) + self.position
        angles = torch.stack((t, t - r), 1)[:, :, None] * self.frequencies
        times = torch.cat((angles.sin(), angles.cos()), 2).flatten(1)
        condition = F.silu(self.time(times) + self.label(labels))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        image = x.view(count, grid, grid, p, p).transpose(2, 3).reshape(z.shape)
        return (z - image) / t.clamp_min(EARLIEST).view(-1, 1, 1, 1)
