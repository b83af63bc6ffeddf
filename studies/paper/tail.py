"""The last blocks of a vision transformer that classifies by its class token, with a classifier."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from tangent_ops.model.read_rows import run_block


class ClassTokenTail(nn.Module):
    """The last `depth` blocks, the norm and a new classifier of zeros: tokens -> logits.

    Args:
        model: timm's VisionTransformer with token pooling, without a classifier.
        depth: Blocks; 0 for norm and classifier.
        classes: Outputs.
    """

    def __init__(self, model: Any, depth: int, classes: int) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(model.blocks[len(model.blocks) - depth :])
        self.norm = copy.deepcopy(model.norm)
        self.head = nn.Linear(model.num_features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """What enters the classifier: (B, D)."""
        if not len(self.blocks):
            return self.norm(tokens)
        *others, last = self.blocks
        for block in others:
            tokens = block(tokens)
        return self.norm(run_block(last, tokens, 1)[:, 0])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))
