"""fused_forward_ad: dual attention in models that know nothing of this library."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    assert_near,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    oracle,
    vit,
)
from small_models import exact_jvp as exact_jvp_of_weights
from torch import Tensor, nn
from torch.autograd import forward_ad

import tangent_ops.ops.forward_ad
from tangent_ops import fused_forward_ad, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError


class Attend(nn.Module):
    """Attention as people write it, with every argument by keyword or by position."""

    def __init__(self, keywords: bool = True, **options):
        super().__init__()
        self.keywords = keywords
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keywords:
            return F.scaled_dot_product_attention(query=q, key=k, value=v, **self.options)
        return F.scaled_dot_product_attention(q, k, v, *self.options.values())


def operands(count: int = 3, heads: int = 2, tokens: int = 5) -> tuple[Tensor, ...]:
    source = generator(1)
    return tuple(torch.randn(2, heads, tokens, 16, generator=source) for _ in range(count))


def exact_jvp(model: nn.Module, inputs: tuple[Tensor, ...], inputs_t: tuple[Tensor, ...]):
    """By torch.func.jvp in float64 under PyTorch's MATH backend."""
    run = oracle(model)
    return torch.func.jvp(
        lambda *x: run(*x)({}),
        tuple(x.double() for x in inputs),
        tuple(x.double() for x in inputs_t),
    )


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
    exact = exact_jvp(model, (x,), (x_t,))
    with fused_forward_ad():
        assert_near(torch.func.jvp(model, (x,), (x_t,)), exact)
        assert len(fused_calls) == 2
        with forward_ad.dual_level():
            output = model(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(output)), exact)
    assert len(fused_calls) == 4


@pytest.mark.parametrize("keywords", [True, False])
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
def test_arguments_by_keyword_and_by_position(options, keywords):
    model = Attend(keywords, **options)
    q, k, v, *tangents = operands(6)
    # The oracle's options are float64, too, where they are numbers.
    exact = copy.deepcopy(model)
    exact.options = {
        n: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o
        for n, o in options.items()
    }
    with fused_forward_ad():
        found = torch.func.jvp(model, (q, k, v), tuple(tangents))
    assert_near(found, exact_jvp(exact, (q, k, v), tuple(tangents)))


def test_scale_and_grouped_heads():
    model = Attend(scale=0.7, enable_gqa=True)
    (q, q_t), (k, k_t, v, v_t) = operands(2, heads=4), operands(4)
    with fused_forward_ad():
        found = torch.func.jvp(model, (q, k, v), (q_t, k_t, v_t))
    assert_near(found, exact_jvp(model, (q, k, v), (q_t, k_t, v_t)))


def test_a_dual_mask_alone(fused_calls):
    q, k, v = operands()
    mask, mask_t = torch.randn(2, 5, 5, generator=generator(2))
    with fused_forward_ad():
        found = torch.func.jvp(
            lambda m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), (mask,), (mask_t,)
        )
    assert len(fused_calls) == 1

    class Masked(nn.Module):
        def forward(self, m):
            return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=m)

    assert_near(found, exact_jvp(Masked(), (mask,), (mask_t,)))


def test_calls_without_a_tangent_stay_pytorchs(fused_calls):
    q, k, v = operands()
    plain = F.scaled_dot_product_attention(q, k, v)
    with fused_forward_ad():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)
        with forward_ad.dual_level():
            forward_ad.make_dual(q, k)  # there is a tangent, but not here
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
    """Its functional form is overridable itself, which hides the attention within."""
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)

    class Layer(nn.Module):
        def __init__(self, weights: bool):
            super().__init__()
            self.attention = attention
            self.weights = weights

        def forward(self, x):
            return self.attention(x, x, x, need_weights=self.weights, attn_mask=mask)[0]

    x, x_t = torch.randn(2, 3, 5, 16, generator=generator(4))
    with fused_forward_ad():
        found = torch.func.jvp(Layer(False), (x,), (x_t,))
    # Asked for its weights, PyTorch's writes the formula out, which is derivable.
    assert_near(found, exact_jvp(Layer(True), (x,), (x_t,)))
    with fused_forward_ad():
        assert_near(torch.func.jvp(Layer(True), (x,), (x_t,)), found)
        with forward_ad.dual_level():
            dual = Layer(True)(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(dual)), found)
        value = Layer(False)(x)
    assert_near(value, found[0])


class Encoder(nn.Module):
    """What of an encoder's output means something: not its padded places."""

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
        assert_near(torch.func.jvp(model, (x,), (x_t,)), exact_jvp(model, (x,), (x_t,)))
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
    assert_near(tangent.primal_and_tangent(x), exact_jvp_of_weights(model, tangent.deltas(), x))


def test_modes_nest_and_leave_cleanly():
    q, k, v, *tangents = operands(6)
    depth = torch._C._len_torch_function_stack()
    with fused_forward_ad(), fused_forward_ad(backend="reference"):
        found = torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    assert_near(found, exact_jvp(Attend(), (q, k, v), tuple(tangents)))
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
        torch.func.jvp(Attend(is_causal=True), (q, k, v), tuple(tangents))
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
    assert_near(found, torch.stack([exact_jvp(model, (x,), (t,))[1] for t in tangents]))


def test_compiles_whole():
    model, x, x_t = vit(depth=1).eval(), images(), images(seed=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, x_t):
        with fused_forward_ad():
            return torch.func.jvp(model, (x,), (x_t,))

    assert_near(compiled(x, x_t), exact_jvp(model, (x,), (x_t,)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Normalized(nn.Module):
    """Rows of unit length; rows of zeros (padding) stay."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 2))
        return self.last(F.normalize(self.first(padded), dim=-1))


LACKING = {
    "normalize": Normalized,
    "hardsigmoid": lambda: nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 3)),
    "in place": lambda: nn.Sequential(nn.LayerNorm(6), nn.Hardsigmoid(inplace=True)),
    "glu": lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)),
    "lstm": lambda: Recurrent(nn.LSTM(6, 4, batch_first=True, bidirectional=True)),
    "gru": lambda: Recurrent(nn.GRU(6, 4, batch_first=True)),
    "rnn": lambda: Recurrent(nn.RNN(6, 4, batch_first=True)),
}


@pytest.mark.parametrize("name", LACKING)
def test_layers_whose_tangent_pytorch_cannot_differentiate(name):
    torch.manual_seed(0)
    model = LACKING[name]()
    x = 3 * torch.randn(2, 5, 6, generator=generator(1))  # beyond hardsigmoid's kinks, too
    tangent = moved(linearize(model))
    primal, primal_t = tangent.primal_and_tangent(x)
    assert_near((primal, primal_t), exact_jvp_of_weights(model, tangent.deltas(), x))
    cotangent = torch.randn(primal.shape, generator=generator(4))
    grads = torch.autograd.grad(primal_t, list(tangent.deltas().values()), cotangent)
    exact = exact_vjp(model, list(tangent.deltas()), cotangent, x)
    assert_near(grads, [exact[name] for name in tangent.deltas()])
