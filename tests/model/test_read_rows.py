"""The last block for the rows that are read computes what the ordinary block computes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VIT, assert_near, exact_jvp, exact_vjp, family, generator, images, moved
from small_models import vit as small_vit
from timm.layers.attention import Attention
from timm.layers.mlp import SwiGLU
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops import last_blocks, linearize
from tangent_ops.delta import fingerprint
from tangent_ops.model.features import split_model
from tangent_ops.model.read_rows import count_read_rows, form_of, forms_keys, run_block, why_not

KINDS = {
    "absorbed": {},
    "keys": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "attention norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "drop_path_rate": 0.2},
    "gated": {"attn_layer": partial(Attention, gated=True)},
    "swiglu": {"mlp_layer": SwiGLU, "fc_norm": True},
    "post norm": {"block_fn": ResPostBlock},
    "parallel": {"block_fn": ParallelThingsBlock, "qk_norm": True},
}
POOLS = ["avg", "avgmax", "max", "map"]


def vit(**options):
    if "attn_layer" in options:  # timm asks for a class
        gated = type("Attention", (Attention,), {"__init__": partial_init(options["attn_layer"])})
        options["attn_layer"] = gated
    return small_vit(**options)


def partial_init(layer: partial):
    def init(self, *args, depth: int = 0, **kwargs):
        Attention.__init__(self, *args, **kwargs, **layer.keywords)

    return init


def rows_of_mlp(block: nn.Module, call) -> int:
    """How many rows the block's MLP computes in a call."""
    seen: list[int] = []
    (layer,) = [m for n, m in block.named_modules() if n in ("mlp.fc2", "ffns.0.mlp.fc2")]
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    call()
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_tail_and_whole_call_are_exact(kind) -> None:
    model, x = vit(**KINDS[kind]).eval(), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, tail = tangent.split()
    tokens = trunk(x)
    deltas = tangent.deltas()
    exact = exact_jvp(model, deltas, x)
    assert_near(tail.primal_and_tangent(tokens), exact)
    assert_near(tangent.primal_and_tangent(x), exact)
    cotangent = torch.randn(2, 5, generator=generator(4))
    gradients = exact_vjp(model, list(deltas), cotangent, x)
    for output in (tail(tokens), tangent(x)):
        found = torch.autograd.grad(output, list(deltas.values()), cotangent)
        pairs = zip(gradients.items(), found, strict=True)
        # A norm's shift of all keys adds the same to all logits: rounding is left of its gradient.
        rest = [(right, one) for (name, right), one in pairs if not name.endswith("k_norm.bias")]
        assert_near([one for _, one in rest], [right for right, _ in rest])
    last = tail.anchor.get_submodule("blocks.2")
    assert rows_of_mlp(last, lambda: tail(tokens)) == 1


def test_distilled_reads_two_rows() -> None:
    model, x = family("deit_tiny_distilled_patch16_224", **VIT), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, tail = tangent.split()
    tokens = trunk(x)
    exact = exact_jvp(model, tangent.deltas(), x)
    assert_near(tail.primal_and_tangent(tokens), exact)
    assert_near(tangent.primal_and_tangent(x), exact)
    assert rows_of_mlp(tail.anchor.get_submodule("blocks.2"), lambda: tail(tokens)) == 2


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    count=st.integers(3, 9),
    batch=st.integers(1, 3),
    rows=st.integers(1, 3),
    normed=st.booleans(),
    bias=st.booleans(),
)
def test_values_and_gradients_in_float64(heads, width, count, batch, rows, normed, bias) -> None:
    torch.manual_seed(heads * width + count)
    block = Block(heads * width, heads, qkv_bias=bias, qk_norm=normed, init_values=0.5).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(batch, count, heads * width, dtype=torch.float64, requires_grad=True)
    right = block(tokens)[:, :rows]
    found = run_block(form_of(block), block, tokens, rows)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    leaves = [tokens, *block.parameters()]
    cotangent = torch.randn_like(right)
    pairs = (torch.autograd.grad(y, leaves, cotangent) for y in (found, right))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    if bias and not normed:
        shift = block.get_parameter("attn.qkv.bias")
        (gradient,) = torch.autograd.grad(
            run_block(form_of(block), block, tokens, rows).sum(), shift
        )
        assert not gradient.chunk(3)[1].any()  # keys' biases drop out


def test_names_and_fingerprint_are_the_models() -> None:
    model = vit()
    before = fingerprint(model.state_dict())
    trunk, tail = split_model(model.eval(), 2)
    tail(trunk(images()))
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in tail.named_parameters())
    assert "blocks.2.attn.qkv.weight" in dict(tail.named_parameters())
    assert fingerprint(model.state_dict()) == before


@pytest.mark.parametrize("pool", POOLS)
def test_other_pooling_takes_the_ordinary_block(pool) -> None:
    model, x = vit(global_pool=pool).eval(), images()
    assert count_read_rows(model) == 0
    trunk, tail = split_model(model, 2)
    assert_near(tail(trunk(x)), model(x), 1e-6)
    assert rows_of_mlp(tail.get_submodule("blocks.2"), lambda: tail(trunk(x))) == 17


def test_blocks_without_a_form() -> None:
    assert count_read_rows(vit(block_fn=ParallelScalingBlock)) == 0
    assert why_not(ParallelScalingBlock(12, 2)) == "no form for ParallelScalingBlock"
    assert why_not(Block(12, 2, attn_layer="diff")) == "no form for DiffAttention"
    assert not forms_keys(Block(12, 2)) and forms_keys(Block(12, 2, qk_norm=True))


class Mixes(nn.Module):
    """A norm that mixes tokens: what one row is depends on all of them."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("place", ["norm", "blocks.2.norm2", "blocks.2.mlp"])
@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.filterwarnings("ignore::tangent_ops.errors.ZeroHeadWarning")
@pytest.mark.filterwarnings("ignore::tangent_ops.errors.NoGradientWarning")
def test_tokens_that_mix_are_found_by_value(place, zero_head) -> None:
    model, x = vit().eval(), images()
    model.set_submodule(place, Mixes(model.get_submodule(place)))
    if zero_head:  # with which all outputs agree
        nn.init.zeros_(model.head.weight)  # pyright: ignore[reportArgumentType]
    assert count_read_rows(model) == 1
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, tail = tangent.split()
    exact = exact_jvp(model, tangent.deltas(), x)
    assert_near(sum(tail.primal_and_tangent(trunk(x))), sum(exact))
    assert_near(sum(tangent.primal_and_tangent(x)), sum(exact))
    assert tail.anchor.rows == 0


def test_hooks_on_the_last_block_see_the_ordinary_call() -> None:
    model, x = vit(), images()
    tangent = linearize(model, last_blocks(model, 1))
    trunk, tail = tangent.split()
    tokens = trunk(x)
    _ = tangent(x), tail(tokens)  # their checks of derivatives run first, without hooks
    seen = []
    for place in ("blocks.2", "blocks.2.attn"):
        module = tangent.anchor.get_submodule(place)
        handle = module.register_forward_hook(lambda *call: seen.append(call[-1].shape))
        tangent(x)
        tail(tokens)
        handle.remove()
    assert seen == [(2, 17, 48)] * 4
    inside = tangent.anchor.get_submodule("blocks.2.mlp.fc1")
    handle = inside.register_forward_hook(lambda *call: seen.append(call[1][0].shape))
    tangent(x)
    handle.remove()
    assert seen[-1] == (2, 17, 48)
    assert "forward" not in vars(tangent.anchor.get_submodule("blocks.2"))


def test_hooks_see_one_ordinary_first_call() -> None:
    tangent = linearize(vit(), check=False)
    seen = []
    norm = tangent.anchor.get_submodule("norm")
    norm.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    tangent(images())
    assert seen == [(2, 17, 48)]


def test_whole_calls_do_less_work() -> None:
    model, x = vit(depth=1), images()
    short, ordinary = (linearize(m, last_blocks(m, 1), check=False) for m in (model, model))
    ordinary.anchor.get_submodule("blocks.0").register_forward_hook(lambda *_: None)
    counts = []
    for tangent in (short, ordinary):
        tangent(x)
        with FlopCounterMode(display=False) as counter:
            tangent(x)
        counts.append(counter.get_total_flops())
    assert 4 * counts[0] < counts[1]


def test_a_mask_gets_the_ordinary_call() -> None:
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    found = tangent.primal_and_tangent(x, attn_mask=mask)
    assert_near(found, exact_jvp(model, tangent.deltas(), x, attn_mask=mask))


@pytest.mark.parametrize("kind", ["absorbed", "keys"])
def test_compiled_tails(kind) -> None:
    model, x = vit(**KINDS[kind]), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, tail = tangent.split()
    compiled = torch.compile(tail, backend="aot_eager", fullgraph=True)
    assert_near(compiled(trunk(x)), sum(exact_jvp(model, tangent.deltas(), x)))


def test_copies_of_a_tail_are_their_own() -> None:
    model, x = vit().eval(), images()
    trunk, tail = split_model(model, 2)
    tokens = trunk(x)
    copied = copy.deepcopy(tail)
    with torch.no_grad():
        copied.get_parameter("blocks.2.attn.qkv.weight").add_(0.1)
    assert torch.equal(tail(tokens), tail(tokens))
    assert not torch.allclose(copied(tokens), tail(tokens))
