"""The class token's tail and its derivative agree with timm's blocks."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.tail import ClassTokenTail


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="token",
        init_values=0.1,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def _through_timm(model: VisionTransformer, tokens: torch.Tensor, depth: int) -> torch.Tensor:
    for block in model.blocks[len(model.blocks) - depth :]:
        tokens = block(tokens)
    return model.norm(tokens)[:, 0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_are_those_of_timms_blocks(model: VisionTransformer, depth: int) -> None:
    tokens = torch.randn(5, 5, 48, dtype=torch.float64)
    tail = ClassTokenTail(model, depth, classes=7).double()
    torch.testing.assert_close(tail.features(tokens), _through_timm(model, tokens, depth))
    assert tail(tokens).shape == (5, 7)


def test_without_blocks_it_is_norm_and_classifier(model: VisionTransformer) -> None:
    row = torch.randn(5, 48, dtype=torch.float64)
    tail = ClassTokenTail(model, 0, classes=7).double()
    torch.testing.assert_close(tail.features(row), model.norm(row))
