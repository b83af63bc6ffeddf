"""TangentAttention: timm's Attention, with tangents."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    VIT,
    assert_near,
    exact_input_jvp,
    exact_jvp,
    family,
    generator,
    images,
    oracle,
    shaken,
    vit,
)
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.davit import ChannelAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from tangent_ops import fused_forward_ad
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.ops.nn import TangentAttention

DIM, HEADS, TOKENS = 48, 3, 7

KINDS = {
    "plain": {},
    "bias": {"qkv_bias": True, "proj_bias": False},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "head_dim": {"attn_head_dim": 24},
}
MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1)},
    "additive": {"attn_mask": torch.linspace(-1, 2, TOKENS**2).reshape(TOKENS, TOKENS)},
    "causal": {"is_causal": True},
}


def attention(**options) -> Attention:
    torch.manual_seed(0)
    module = Attention(DIM, HEADS, **options)
    shaken(module, 0.2)
    return module


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, TOKENS, DIM, generator=generator(seed))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_tangent_and_gradients(kind, mask):
    original, options = attention(**KINDS[kind]), MASKS[mask]
    module = TangentAttention.from_timm(copy.deepcopy(original))
    x, x_t = tokens(), tokens(2)
    expected = original(x, **options)
    found = module(x, **options)
    assert torch.equal(found, expected)  # PyTorch's own attention: nothing is dual

    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in original.named_parameters():
        assert_near(module.get_parameter(name).grad, parameter.grad, 1e-6)

    exact = exact_input_jvp(original, (x,), (x_t,), **options)
    assert_near(torch.func.jvp(lambda x: module(x, **options), (x,), (x_t,)), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_of_parameters(kind):
    original = attention(**KINDS[kind])
    module = TangentAttention.from_timm(copy.deepcopy(original))
    x, noise = tokens(), generator(3)
    weights = {n: p.detach() for n, p in original.named_parameters()}
    tangents = {n: torch.randn(p.shape, generator=noise) for n, p in weights.items()}
    found = torch.func.jvp(
        lambda w: torch.func.functional_call(module, w, (x,)), (weights,), (tangents,)
    )
    assert_near(found, exact_jvp(original, tangents, x))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind):
    original = attention(**KINDS[kind])
    module = TangentAttention.from_timm(attention(**KINDS[kind]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    assert module.state_dict().keys() == original.state_dict().keys()
    original.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(original(tokens()), module(tokens()))
    module.load_state_dict(attention(**KINDS[kind]).state_dict(), strict=True)
    assert torch.equal(attention(**KINDS[kind])(tokens()), module(tokens()))


def test_built_by_hand_it_is_timms():
    options = {"qkv_bias": True, "proj_bias": False, "attn_drop": 0.1, "proj_drop": 0.2}
    torch.manual_seed(4)
    original = Attention(DIM, HEADS, **options)
    torch.manual_seed(4)
    module = TangentAttention(DIM, HEADS, **options)
    module.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(module.eval()(tokens()), original.eval()(tokens()))
    assert (module.attn_drop.p, module.proj_drop.p) == (0.1, 0.2)
    with pytest.raises(ValueError, match="dim=10 is not a multiple of num_heads=3"):
        TangentAttention(10, 3)


def test_dropout_in_training_drops_what_timms_drops():
    original = attention(attn_drop=0.4, proj_drop=0.3).train()
    module = TangentAttention.from_timm(original)
    assert module.training
    outputs = []
    for attend in (original, module):
        torch.manual_seed(5)
        outputs.append(attend(tokens()))
    assert torch.equal(*outputs)
    assert not torch.equal(module(tokens()), outputs[1])
    assert torch.equal(module.eval()(tokens()), original.eval()(tokens()))


def test_takes_over_mode_and_scale():
    original = attention(attn_drop=0.5).eval()
    original.scale = 0.7
    setattr(original, "fused_attn", False)  # noqa: B010 - timm heeds its scale only then
    module = TangentAttention.from_timm(original)
    assert not module.training
    assert_near(module(tokens()), oracle(original)(tokens())({}))


def test_the_scale_that_a_fused_original_ignores_is_ignored():
    original = attention()
    original.scale = 0.7
    assert torch.equal(TangentAttention.from_timm(original)(tokens()), original(tokens()))


def test_takes_over_the_modes_of_the_parts_and_draws_no_random_numbers():
    original = attention(scale_norm=True, norm_layer=nn.LayerNorm).train()
    original.norm.eval()
    state = torch.get_rng_state()
    module = TangentAttention.from_timm(original)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and module.proj_drop.training and not module.norm.training


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_shared_in_timms_order(kind):
    original = attention(**KINDS[kind])
    found = [*TangentAttention.from_timm(original).named_parameters()]
    own = [*original.named_parameters()]
    assert [name for name, _ in found] == [name for name, _ in own]
    assert all(one is other for (_, one), (_, other) in zip(found, own, strict=True))


def test_the_state_of_an_optimizer_goes_over():
    """gate.weight and proj.weight have one shape, so another order would raise no error."""
    original = attention(gated=True, qkv_bias=True)
    other = TangentAttention.from_timm(copy.deepcopy(original))
    first = torch.optim.AdamW(original.parameters(), lr=0.1)
    second = torch.optim.AdamW(other.parameters(), lr=0.1)
    original(tokens()).square().sum().backward()
    first.step()
    other.load_state_dict(original.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for module, optimizer in ((original, first), (other, second)):
        optimizer.zero_grad()
        module(tokens()).square().sum().backward()
        optimizer.step()
    for name, parameter in original.named_parameters():
        assert_near(other.get_parameter(name), parameter, 1e-6)


def test_one_part_under_two_names():
    original = attention(qk_norm=True, norm_layer=nn.LayerNorm)
    original.k_norm = original.q_norm
    module = TangentAttention.from_timm(original)
    assert module.k_norm is original.q_norm
    assert torch.equal(module(tokens()), original(tokens()))


def test_a_mask_with_is_causal_is_what_it_was_in_the_original():
    options = {"attn_mask": MASKS["additive"]["attn_mask"], "is_causal": True}
    fused, unfused = attention(), attention()
    setattr(unfused, "fused_attn", False)  # noqa: B010
    if torch.__version__ >= "2.12":  # before, a CPU joined the two
        with pytest.raises(RuntimeError):
            fused(tokens(), **options)
    with pytest.raises(ArgumentError, match="attn_mask and is_causal=True exclude each other"):
        TangentAttention.from_timm(fused)(tokens(), **options)

    module = TangentAttention.from_timm(unfused)
    exact = exact_input_jvp(unfused, (tokens(),), (tokens(2),), **options)
    assert_near(module(tokens(), **options), exact[0])
    found = torch.func.jvp(lambda x: module(x, **options), (tokens(),), (tokens(2),))
    assert_near(found, exact)


@pytest.mark.parametrize(
    "module",
    [
        BeitAttention(DIM, HEADS, qkv_bias=True, window_size=(2, 2)),
        WindowAttention(DIM, HEADS, window_size=4),
        AttentionRope(DIM, HEADS),
        ChannelAttention(DIM, HEADS),  # timm's part names, another formula
        nn.Linear(DIM, DIM),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_attention_is_refused(module):
    with pytest.raises(UnsupportedError, match=r"its forward is another one.*fused_forward_ad"):
        TangentAttention.from_timm(module)


def test_a_part_that_would_be_lost_is_refused():
    original = attention()
    original.extra = nn.Linear(2, 2)
    original.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedError, match=r"its extra, gain would be lost.*fused_forward_ad"):
        TangentAttention.from_timm(original)


def test_an_unfused_original_that_calls_its_dropout():
    for change in (
        lambda attn: setattr(attn, "attn_drop", nn.Identity()),
        lambda attn: attn.attn_drop.register_forward_hook(lambda *_: None),
    ):
        original = attention()
        change(original)
        TangentAttention.from_timm(original)  # fused, it is not called
        setattr(original, "fused_attn", False)  # noqa: B010
        with pytest.raises(UnsupportedError, match=r"its attn_drop.*fused_forward_ad"):
            TangentAttention.from_timm(original)


def test_a_forward_or_hook_of_the_instance_is_refused():
    original = attention()
    setattr(original, "forward", lambda x: x)  # noqa: B010
    with pytest.raises(UnsupportedError, match="its forward is another one"):
        TangentAttention.from_timm(original)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        original = attention()
        getattr(original, register)(lambda *_: None)
        with pytest.raises(UnsupportedError, match=r"its forward_(pre_)?hooks would be lost"):
            TangentAttention.from_timm(original)


def swapped(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.blocks:  # pyright: ignore
        block.attn = TangentAttention.from_timm(block.attn)
    return model


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_attn_norm": True}])
def test_in_a_vision_transformer(options):
    model = family("vit_small_patch16_224", **VIT, **options).eval()
    other = swapped(model)
    other.load_state_dict(model.state_dict(), strict=True)
    x, x_t = images(), images(seed=2)
    assert torch.equal(other(x), model(x))

    exact = exact_input_jvp(model, (x,), (x_t,))
    assert_near(torch.func.jvp(other, (x,), (x_t,)), exact)


def test_masks_reach_it_through_the_block():
    model, x = vit().eval(), images()
    other = swapped(model)
    mask = torch.ones(17, 17, dtype=torch.bool).tril(3)
    assert torch.equal(other(x, attn_mask=mask), model(x, attn_mask=mask))
    assert torch.equal(other(x, is_causal=True), model(x, is_causal=True))


def test_compiles_whole():
    original = attention(gated=True)
    module, (x, x_t) = TangentAttention.from_timm(original), (tokens(), tokens(2))
    exact = exact_input_jvp(original, (x,), (x_t,))
    plain = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_near(plain(x), exact[0])
    dual = torch.compile(
        lambda x, x_t: torch.func.jvp(module, (x,), (x_t,)), fullgraph=True, backend="aot_eager"
    )
    assert_near(dual(x, x_t), exact)


TO_GRAPHS = {
    "fx": torch.fx.symbolic_trace,
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, tokens(8), check_trace=False),
    "export": lambda module: torch.export.export(module, (tokens(8),)).module(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", TO_GRAPHS)
def test_becomes_a_graph_as_timms_does(way, kind, fused):
    original = attention(**KINDS[kind]).eval()
    original.fused_attn = fused  # pyright: ignore[reportAttributeAccessIssue]
    module = TangentAttention.from_timm(original)
    assert_near(TO_GRAPHS[way](module)(tokens()), original(tokens()), 1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
@pytest.mark.parametrize("mask", MASKS)
def test_a_graph_takes_masks_and_tangents(mask):
    original, options = attention().eval(), MASKS[mask]
    module = TangentAttention.from_timm(original)
    scripted, traced = torch.jit.script(module), torch.fx.symbolic_trace(module)
    assert torch.equal(scripted(tokens(), **options), original(tokens(), **options))

    exact = exact_input_jvp(original, (tokens(),), (tokens(2),), **options)
    found = torch.func.jvp(lambda x: traced(x, **options), (tokens(),), (tokens(2),))
    assert_near(found, exact)
    with pytest.raises(NotImplementedError):  # TorchScript has PyTorch's attention
        torch.func.jvp(scripted, (tokens(),), (tokens(2),))


def test_a_model_is_traced_symbolically():
    model = vit().eval()
    assert torch.equal(torch.fx.symbolic_trace(swapped(model))(images()), model(images()))


def test_compiles_under_the_mode() -> None:
    torch._dynamo.reset()
    original = Attention(DIM, HEADS).requires_grad_(False)
    x, x_t = (torch.randn(2, TOKENS, DIM, generator=generator(seed)) for seed in (1, 2))
    module = TangentAttention.from_timm(original)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        with fused_forward_ad():
            return torch.func.jvp(module, (x,), (x_t,))

    assert_near(compiled(x, x_t), exact_input_jvp(original, (x,), (x_t,)))
