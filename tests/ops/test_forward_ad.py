"""fused_forward_ad: unmodified models on dual tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    Computes,
    assert_exact,
    assert_near,
    exact_input_jvp,
    exact_jvp,
    family,
    generator,
    images,
    moved,
    vit,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import tangent_ops.ops.forward_ad
from tangent_ops import fused_forward_ad, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError


class Attend(nn.Module):
    """Attention with every argument by keyword."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return F.scaled_dot_product_attention(query=q, key=k, value=v, **options)


def by_position(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, *options.values())


def operands(count: int = 3, heads: int = 2, tokens: int = 5) -> tuple[Tensor, ...]:
    source = generator(1)
    return tuple(torch.randn(2, heads, tokens, 16, generator=source) for _ in range(count))


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the calls that the mode takes over."""
    calls = []
    original = tangent_ops.ops.forward_ad.scaled_dot_product_attention

    def counted(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(tangent_ops.ops.forward_ad, "scaled_dot_product_attention", counted)
    return calls


def test_why_it_exists():
    q, k, v, *tangents = operands(6)
    try:
        torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    except NotImplementedError as error:
        assert "forward AD" in str(error)
    else:
        pytest.skip("this torch has a forward derivative of its fast attention")


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "eva02_tiny_patch14_224"])
def test_unmodified_model_under_jvp_and_dual_level(name, fused_calls):
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = family(name, **options).eval()
    x, x_t = images(), images(seed=2)
    exact = exact_input_jvp(model, (x,), (x_t,))
    with fused_forward_ad():
        assert_near(torch.func.jvp(model, (x,), (x_t,)), exact)
        assert len(fused_calls) == 2
        with forward_ad.dual_level():
            output = model(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(output)), exact)
    assert len(fused_calls) == 4


@pytest.mark.parametrize("attend", [Attend(), by_position], ids=["keyword", "position"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.tensor([[True, False, True, True, False]] * 5)},
        {"attn_mask": torch.linspace(-2, 1, 25).reshape(5, 5)},
        {"attn_mask": None, "dropout_p": 0.0, "is_causal": True},
    ],
    ids=["plain", "boolean", "additive", "causal"],
)
def test_arguments_by_keyword_and_by_position(options, attend):
    q, k, v, *tangents = operands(6)
    with fused_forward_ad():
        found = torch.func.jvp(lambda *x: attend(*x, **options), (q, k, v), tuple(tangents))
    assert_near(found, exact_input_jvp(Attend(), (q, k, v), tuple(tangents), **options))


def test_scale_and_grouped_heads():
    options = {"scale": 0.7, "enable_gqa": True}
    (q, q_t), (k, k_t, v, v_t) = operands(2, heads=4), operands(4)
    with fused_forward_ad():
        found = torch.func.jvp(lambda *x: Attend()(*x, **options), (q, k, v), (q_t, k_t, v_t))
    assert_near(found, exact_input_jvp(Attend(), (q, k, v), (q_t, k_t, v_t), **options))


def test_a_dual_mask_alone(fused_calls):
    q, k, v = operands()
    mask, mask_t = torch.randn(2, 5, 5, generator=generator(2))
    with fused_forward_ad():
        found = torch.func.jvp(
            lambda m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), (mask,), (mask_t,)
        )
    assert len(fused_calls) == 1

    wide = [x.double() for x in (q, k, v)]
    masked = Computes(lambda _, m: F.scaled_dot_product_attention(*wide, attn_mask=m))
    assert_near(found, exact_input_jvp(masked, (mask,), (mask_t,)))


def test_calls_without_a_tangent_stay_pytorchs(fused_calls):
    q, k, v = operands()
    plain = F.scaled_dot_product_attention(q, k, v)
    with fused_forward_ad():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)
        with forward_ad.dual_level():
            forward_ad.make_dual(q, k)  # another tensor has a tangent
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)

        def mixed(x):
            return F.scaled_dot_product_attention(q, k, v) + x

        value, _ = torch.func.jvp(mixed, (q,), (k,))
        assert torch.equal(value, plain + q)
    assert fused_calls == []
    leaf = q.clone().requires_grad_()
    with fused_forward_ad():
        F.scaled_dot_product_attention(leaf, k, v).sum().backward()  # ordinary training
    assert fused_calls == [] and leaf.grad is not None


def test_multi_head_attention_of_torch(fused_calls):
    """A mode sees its functional form first, and has to reach the attention inside."""
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def layer(weights: bool) -> nn.Module:
        return Computes(
            lambda m, x: m.attention(x, x, x, need_weights=weights, attn_mask=mask)[0],
            attention=attention,
        )

    x, x_t = torch.randn(2, 3, 5, 16, generator=generator(4))
    with fused_forward_ad():
        found = torch.func.jvp(layer(False), (x,), (x_t,))
    # With need_weights PyTorch computes elementary operations, which have derivatives.
    assert_near(found, exact_input_jvp(layer(True), (x,), (x_t,)))
    with fused_forward_ad():
        assert_near(torch.func.jvp(layer(True), (x,), (x_t,)), found)
        with forward_ad.dual_level():
            dual = layer(True)(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(dual)), found)
        value = layer(False)(x)
    assert_near(value, found[0])
    with torch.device("cpu"), fused_forward_ad():  # another mode, around ours
        assert_near(torch.func.jvp(layer(False), (x,), (x_t,)), found)


class Encoder(nn.Module):
    """An encoder whose output leaves out the padded tokens."""

    padded: Tensor

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.register_buffer("padded", torch.arange(5) >= torch.tensor([[5], [3]]))

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=self.padded)[~self.padded]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_encoder_with_padding():
    model, (x, x_t) = Encoder().eval(), torch.randn(2, 2, 5, 16, generator=generator(4))
    with fused_forward_ad():
        assert_near(torch.func.jvp(model, (x,), (x_t,)), exact_input_jvp(model, (x,), (x_t,)))
    call = {"src_key_padding_mask": model.padded}
    with torch.no_grad(), fused_forward_ad():
        plain, inside = model.encoder(x, **call), model(x)
    assert torch.equal(plain, model.encoder(x, **call))  # PyTorch's own where gradients are wanted
    with torch.no_grad():
        fast = model.encoder(x, **call)  # with zeros at the padded places
        assert_near(inside, model(x))
    assert not fast[model.padded].any() and plain[model.padded].all()

    tangent = moved(linearize(model))
    x.requires_grad_()
    assert_near(tangent.primal_and_tangent(x), exact_jvp(model, tangent.deltas(), x))


def test_modes_nest_and_leave_cleanly():
    q, k, v, *tangents = operands(6)
    depth = torch._C._len_torch_function_stack()
    with fused_forward_ad(), fused_forward_ad(backend="reference"):
        found = torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    assert_near(found, exact_input_jvp(Attend(), (q, k, v), tuple(tangents)))
    assert torch._C._len_torch_function_stack() == depth

    mode = fused_forward_ad()
    for _ in range(2):  # usable again, also after an error from inside
        with pytest.raises(ZeroDivisionError), mode:
            raise ZeroDivisionError
        with pytest.raises(ArgumentError, match="head_dim"), mode:
            torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, k[..., :8], v), (q,), (k,))
        assert torch._C._len_torch_function_stack() == depth
    with mode, mode:
        torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, k, v), (q,), (k,))
    assert torch._C._len_torch_function_stack() == depth


def test_a_named_backend_is_never_replaced():
    q, k, v, *tangents = operands(6)
    with fused_forward_ad(backend="triton"), pytest.raises(UnsupportedError, match="'triton'"):
        torch.func.jvp(Attend(), (q, k, v), tuple(tangents))
    with pytest.raises(ArgumentError, match="backend='cuda': expected None, 'triton' or 'ref"):
        fused_forward_ad(backend="cuda")  # pyright: ignore[reportArgumentType]


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=r"use torch\.no_grad"):
        fused_forward_ad()


def test_tangents_of_a_batch_by_vmap():
    model, x = vit(depth=1).eval(), images()
    tangents = torch.stack([images(seed=s) for s in (2, 3)])
    with fused_forward_ad():
        found = torch.func.vmap(lambda x_t: torch.func.jvp(model, (x,), (x_t,))[1])(tangents)
    assert_near(found, torch.stack([exact_input_jvp(model, (x,), (t,))[1] for t in tangents]))


def test_compiles_whole():
    model, x, x_t = vit(depth=1).eval(), images(), images(seed=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, x_t):
        with fused_forward_ad():
            return torch.func.jvp(model, (x,), (x_t,))

    assert_near(compiled(x, x_t), exact_input_jvp(model, (x,), (x_t,)))


def recurrent(layer: nn.Module) -> nn.Module:
    return Computes(lambda m, x: m.layer(x)[0], layer=layer)


def normalized() -> nn.Module:
    """Rows of unit length; rows of zeros (padding) stay."""

    def call(m, x: Tensor) -> Tensor:
        return m.last(F.normalize(m.first(F.pad(x, (0, 0, 0, 2))), dim=-1))

    return Computes(call, first=nn.Linear(6, 8, bias=False), last=nn.Linear(8, 3))


LACKING = {
    "normalize": normalized,
    "hardsigmoid": lambda: nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 3)),
    "in place": lambda: nn.Sequential(nn.LayerNorm(6), nn.Hardsigmoid(inplace=True)),
    "glu": lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)),
    "lstm": lambda: recurrent(nn.LSTM(6, 4, batch_first=True, bidirectional=True)),
    "gru": lambda: recurrent(nn.GRU(6, 4, batch_first=True)),
    "rnn": lambda: recurrent(nn.RNN(6, 4, batch_first=True)),
}


@pytest.mark.parametrize("name", LACKING)
def test_layers_whose_tangent_pytorch_cannot_differentiate(name):
    torch.manual_seed(0)
    model = LACKING[name]()
    x = 3 * torch.randn(2, 5, 6, generator=generator(1))  # beyond hardsigmoid's kinks, too
    assert_exact(moved(linearize(model)), model, x)
