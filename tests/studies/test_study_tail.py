"""The class token's tail and its derivative agree with timm's blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.tail import ClassTokenBlock, ClassTokenTail


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


def test_gradients_are_those_of_timms_block(model: VisionTransformer) -> None:
    tokens = torch.randn(4, 5, 48, dtype=torch.float64)
    cotangent = torch.randn(4, 48, dtype=torch.float64)
    last: Any = model.blocks[-1]
    block = ClassTokenBlock(last).double()
    (block(tokens) * cotangent).sum().backward()
    (last(tokens)[:, 0] * cotangent).sum().backward()
    weight, bias = last.attn.qkv.weight.grad, last.attn.qkv.bias.grad
    assert weight is not None and bias is not None
    query, key, value = weight.chunk(3)
    torch.testing.assert_close(block.query.weight.grad, query)
    torch.testing.assert_close(block.key.weight.grad, key.T)
    torch.testing.assert_close(block.value.weight.grad, value)
    torch.testing.assert_close(bias[48:96], torch.zeros(48, dtype=torch.float64))  # keys' bias
    for name in ("norm1", "proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "ls2"):
        own: dict[str, Any] = dict(block.get_submodule(name).named_parameters())
        other = last.get_submodule(f"attn.{name}" if name == "proj" else name)
        for entry, parameter in other.named_parameters():
            torch.testing.assert_close(own[entry].grad, parameter.grad, msg=f"{name}.{entry}")
