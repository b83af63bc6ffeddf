"""The last block for the rows that are read: values, tangents and gradients against float64."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_exact, family, images, moved, vit
from timm.layers.mlp import SwiGLU
from torch import Tensor, nn

from tangent_ops import last_blocks, linearize
from tangent_ops.delta import fingerprint
from tangent_ops.model import read_rows
from tangent_ops.model.features import split_model
from tangent_ops.model.read_rows import count_read_rows, reading_rows, run_block, why_not
from tangent_ops.ops.nn import TangentAttention


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that blocks were computed for."""
    seen: list[int] = []
    attend = read_rows._attend

    def counted(attention: Any, tokens: Tensor, count: int) -> Tensor:
        seen.append(count)
        return attend(attention, tokens, count)

    monkeypatch.setattr(read_rows, "_attend", counted)
    return seen


def with_tangent_attention() -> nn.Module:
    model = vit()
    for block in model.blocks:
        block.attn = TangentAttention.from_timm(block.attn)
    return model


DISTILLED = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
KINDS = {
    "plain": vit,
    "registers": partial(vit, reg_tokens=2),
    "qk norm": partial(vit, qk_norm=True),
    "no bias, no layer scale": partial(vit, qkv_bias=False, proj_bias=False, init_values=None),
    "normed attention": partial(vit, scale_attn_norm=True, scale_mlp_norm=True),
    "swiglu": partial(vit, mlp_layer=SwiGLU),
    "drop path": partial(vit, drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5),
    "distilled": partial(family, "deit_tiny_distilled_patch16_224", **DISTILLED),
    "TangentAttention": with_tangent_attention,
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_calls_and_tails(kind: str, used: list[int]) -> None:
    model = KINDS[kind]()
    x, rows = images(), 2 if kind == "distilled" else 1
    last = re.compile(last_blocks(model, 1)).search
    # The bias of keys' norm adds the same to all logits of a row: its gradient is rounding.
    tangent = moved(linearize(model, lambda n: last(n) and not n.endswith("k_norm.bias")))
    names = list(tangent.deltas())
    assert_exact(tangent, model, x)
    assert used == [rows] * len(used) and used
    used.clear()
    trunk, tail = tangent.split()
    tokens = trunk(x)
    torch.testing.assert_close(tail(tokens), tangent(x), rtol=1e-5, atol=1e-5)
    assert used == [rows] * len(used) and used
    assert list(tail.deltas()) == names  # timm's own
    assert tail.fingerprint == fingerprint(tangent.anchor.state_dict())
    used.clear()
    assert_exact(moved(linearize(model, lambda n: not n.endswith("k_norm.bias"))), model, x)
    assert used


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_the_block(data: st.DataObject) -> None:
    heads, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, min(2, tokens)))
    options = {name: data.draw(st.booleans()) for name in ("qkv_bias", "qk_norm", "proj_bias")}
    model = vit(embed_dim=heads * width, num_heads=heads, depth=1, **options).double().eval()
    block = model.blocks[0]
    assert why_not(block) is None
    x = torch.randn(batch, tokens, heads * width, dtype=torch.float64, requires_grad=True)
    found, exact = run_block(block, x, count), block(x)[:, :count]
    torch.testing.assert_close(found, exact)
    h, parameters = torch.randn_like(exact), [x, *block.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, h), torch.autograd.grad(exact, parameters, h)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"global_pool": "avgmax"},
        {"global_pool": "map"},
        {"global_pool": "", "num_classes": 0},
        {"class_token": False, "reg_tokens": 1, "global_pool": "avg"},
        {"block_fn": None},
    ],
    ids=str,
)
def test_other_models_keep_their_block(options: dict[str, Any], used: list[int]) -> None:
    if "block_fn" in options:
        from timm.models.vision_transformer import ParallelScalingBlock

        options = {"block_fn": ParallelScalingBlock}
    model = vit(**options)
    tangent = moved(linearize(model, last_blocks(model, 1), check=False))
    assert_exact(tangent, model, images())
    if model.global_pool:
        trunk, tail = tangent.split()
        torch.testing.assert_close(tail(trunk(images())), tangent(images()))
    assert not used


class SecondRow(type(vit())):
    """Reads a row that timm's head does not."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 0] + x[:, -1])


def test_a_head_that_reads_other_rows(used: list[int]) -> None:
    """Found by value, also if the head is zero and hides it."""
    model = vit().eval()
    model.__class__ = SecondRow
    assert_exact(moved(linearize(model, last_blocks(model, 1), check=False)), model, images())
    assert not used
    for zero in (False, True):
        if zero:
            nn.init.zeros_(model.head.weight)
        trunk, tail = split_model(model, 2)
        torch.testing.assert_close(tail(trunk(images())), model(images()))
        assert tail.rows == 0


def test_hooks_and_replaced_layers_keep_the_block(used: list[int]) -> None:
    model = vit()
    tangent = moved(linearize(model, last_blocks(model, 1), check=False))
    tokens = torch.randn(2, 17, 48)
    block = tangent.anchor.blocks[-1]
    for module in (block, block.attn.qkv, tangent.anchor.norm):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        tangent(images())
        handle.remove()
        assert seen and not used
    qkv, block.attn.qkv = block.attn.qkv, nn.Sequential(block.attn.qkv)
    torch.testing.assert_close(run_block(block, tokens, 1), block(tokens)[:, :1])
    block.attn.qkv = qkv
    used.clear()
    tangent.set_grad_checkpointing()
    tangent(images()).sum().backward()
    assert not used


def test_the_context_ends() -> None:
    model = vit().eval()
    assert count_read_rows(model) == 1
    x = images()
    expected = model(x)
    with pytest.raises(ZeroDivisionError), reading_rows(model):
        assert model.forward_features(x).shape[1] == 1
        torch.testing.assert_close(model(x), expected)
        raise ZeroDivisionError
    assert model.forward_features(x).shape[1] == 17
