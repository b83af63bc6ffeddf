"""The study's tail is the library's, and every way to fine-tune trains it."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.methods import Start, adapters, lora, low_rank, ordinary, tangent, with_head
from studies.paper.tokens import class_token_tail
from tangent_ops import CachedFeatures


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 4}
    return VisionTransformer(**sizes, num_classes=0, global_pool="token", init_values=0.1).eval()


@pytest.mark.parametrize("depth", [1, 3])
def test_features_are_those_of_timms_blocks(model, depth) -> None:
    tokens = torch.randn(5, 5, 48)
    tail = class_token_tail(model, depth, 0).eval()
    expected = tokens
    for block in model.blocks[3 - depth :]:
        expected = block(expected)
    torch.testing.assert_close(tail(tokens), model.norm(expected)[:, 0])
    assert tail.rows == 1
    own = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in own for parameter in tail.parameters())


@pytest.mark.parametrize("train", [ordinary, tangent, low_rank, lora, adapters])
def test_every_way_trains_blocks_norm_and_classifier(model, train) -> None:
    tokens, targets = torch.randn(8, 5, 48), torch.arange(8) % 3
    head = torch.nn.Linear(48, 3)
    tail = with_head(class_token_tail(model, 1, 3), head)
    with torch.no_grad():
        before = tail(tokens)
        torch.testing.assert_close(before, head(class_token_tail(model, 1, 0).eval()(tokens)))
    trained = train(Start(tail, CachedFeatures(tokens, targets), "square", 0, epochs=2), 1e-2)
    with torch.no_grad():
        assert torch.equal(tail(tokens), before)
        assert not torch.allclose(trained(tokens), before)
    if train in (lora, adapters):  # peft must train the classifier that is called
        changed = {
            name.rpartition(".")[0].rpartition(".")[2]
            for name, parameter in trained.named_parameters()
            if parameter.requires_grad
        }
        assert {"norm", "head"} <= changed
