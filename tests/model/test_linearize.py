"""linearize: value, tangent and gradients against float64, and which parameters are trained."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    SWIN,
    VIT,
    Mlp,
    assert_near,
    double,
    exact_jvp,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    oracle,
    rows,
    vit,
)
from timm.layers.mlp import GluMlp, SwiGLUPacked
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops import last_blocks, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.read_rows import reading_rows

SMALL = "vit_small_patch16_224"
# name: timm architecture, and options that make it small
FAMILIES = {
    "plain": (SMALL, VIT),
    "qk_norm": (SMALL, {**VIT, "qk_norm": True, "scale_attn_norm": True}),
    "registers": (SMALL, {**VIT, "reg_tokens": 2, "global_pool": "map"}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "rope": ("eva02_tiny_patch14_224", {**VIT, "depth": 2}),
    "GEGLU": (SMALL, {**VIT, "mlp_layer": GluMlp, "act_layer": nn.GELU}),
    "SwiGLU": (SMALL, {**VIT, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}),
    "bias": ("beit_base_patch16_224", {**VIT, "depth": 2}),
    "windows": ("swin_tiny_patch4_window7_224", SWIN),
    "batch norm": ("test_resnet", {}),
    "convolutions": ("test_convnext", {}),
}


# --- value, tangent, gradient ----------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_value_tangent_and_gradient_of_real_architectures(name):
    architecture, options = FAMILIES[name]
    model, x = family(architecture, **options), images(2, options.get("img_size", 32))
    tangent = moved(linearize(model))
    deltas = tangent.deltas()
    assert deltas.keys() == dict(model.named_parameters()).keys()

    exact = exact_jvp(model, deltas, x)
    assert_near(tangent.primal_and_tangent(x), exact)
    output = tangent(x)
    assert_near(output, exact[0] + exact[1])

    cotangent = torch.randn(output.shape, generator=generator(6))
    output.backward(cotangent)
    gradients = exact_vjp(model, list(deltas), cotangent, x)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, delta in deltas.items():
        found = torch.zeros_like(delta) if delta.grad is None else delta.grad
        # Relative to the largest gradient: some, as the key's bias's, are zero but for rounding.
        assert float((found - gradients[key]).abs().max()) <= 2e-5 * largest, key


@pytest.mark.parametrize("k", [0, 1, 3])
def test_last_blocks(k):
    model, x = vit(global_pool="avg"), images()
    tangent = moved(linearize(model, last_blocks(model, k)))
    trained = {n for n in tangent.deltas() if n.startswith("blocks.")}
    assert {int(n.split(".")[1]) for n in trained} == set(range(3 - k, 3))
    others = tangent.deltas().keys() - trained
    assert others == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert_near(tangent.primal_and_tangent(x), exact_jvp(model, tangent.deltas(), x))


def test_last_blocks_counts_by_number_not_by_letters():
    model = vit(depth=12, embed_dim=12)
    chosen = linearize(model, last_blocks(model, 11)).deltas()
    assert {int(n.split(".")[1]) for n in chosen if n.startswith("blocks.")} == set(range(1, 12))


def test_zero_delta_is_the_model():
    model, x = vit().eval(), images()
    value, tangent = linearize(model).primal_and_tangent(x)
    assert_near(value, model(x), 1e-6)  # attention is summed in another order
    assert not tangent.any()
    # What has no tangent is computed by the very same operations.
    assert torch.equal(linearize(model, r"^(norm|head)\.")(x), model(x))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4), st.integers(0, 99))
def test_linear_in_the_deltas(weights, seed):
    model, x = Mlp(), rows()
    tangent = linearize(model)
    one_by_one = [moved(linearize(model), seed + i) for i in range(len(weights))]
    with torch.no_grad():
        for name, delta in tangent.deltas().items():
            parts = zip(weights, one_by_one, strict=True)
            delta.copy_(sum((w * t.deltas()[name] for w, t in parts), torch.zeros(())))
    exact = oracle(model)(x)({})
    for weight, part in zip(weights, one_by_one, strict=True):
        exact = exact + weight * exact_jvp(model, part.deltas(), x)[1]
    assert_near(tangent(x), exact)


def test_float64():
    model, x = vit(), images()
    tangent = moved(linearize(copy.deepcopy(model).double()))
    exact = exact_jvp(model, tangent.deltas(), x)
    assert_near(tangent.primal_and_tangent(x.double()), exact, 1e-12)


def test_under_no_grad_inference_mode_and_torch_func():
    model, x = vit(), images()
    tangent = moved(linearize(model))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    with torch.no_grad():
        assert_near(tangent(x), exact)
        assert not tangent(images().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert_near(tangent(x), exact)
    assert_near(torch.func.vmap(lambda image: tangent(image[None])[0])(x), exact)

    deltas = {f"delta.{n}": d.detach() for n, d in tangent.deltas().items()}
    gradients = torch.func.grad(
        lambda d: torch.func.functional_call(tangent, d, (x,)).square().sum()
    )(deltas)
    assert_near(
        {n.removeprefix("delta."): g for n, g in gradients.items()}["head.weight"],
        exact_vjp(model, ["head.weight"], 2 * exact, x)["head.weight"],
    )


def test_gradient_of_the_input_through_value_and_tangent():
    model, x = vit(), images().requires_grad_()
    tangent = moved(linearize(model))
    tangent(x).square().sum().backward()

    exact = x.detach().double().requires_grad_()
    torch.add(*exact_jvp(model, tangent.deltas(), exact)).square().sum().backward()
    assert x.grad is not None
    assert_near(x.grad, exact.grad)


def test_forward_mode_around_a_tangent_model_is_right_or_refused():
    model, x = vit(), images()
    tangent = moved(linearize(model))
    x_t = torch.randn(x.shape, generator=generator(10))
    run = oracle(model)
    weights = double({n: p.detach() for n, p in model.named_parameters()})
    deltas = double({n: d.detach() for n, d in tangent.deltas().items()})
    _, exact = torch.func.jvp(
        lambda x: sum(torch.func.jvp(run(x), (weights,), (deltas,))), (double(x),), (double(x_t),)
    )
    assert_near(torch.func.jvp(tangent, (x,), (x_t,))[1], exact)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="cannot nest in"):
        tangent(forward_ad.make_dual(x, x_t))


@pytest.mark.parametrize("trainable", [None, r"\.qkv\.|head"])
def test_compiles_whole(trainable):
    model, x = vit(depth=1), images()
    tangent = moved(linearize(model, trainable))
    output = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)
    assert_near(output, sum(exact_jvp(model, tangent.deltas(), x)))
    cotangent = torch.randn(output.shape, generator=generator(11))
    output.backward(cotangent)
    name = "blocks.0.attn.qkv.weight"
    assert_near(tangent.deltas()[name].grad, exact_vjp(model, [name], cotangent, x)[name])


# --- what to train ---------------------------------------------------------------------------


def test_trainable_forms():
    model = vit()
    names = list(dict(model.named_parameters()))

    def biases(name):
        return name.endswith(".bias")

    assert list(linearize(model).deltas()) == names
    assert list(linearize(model, r"attn\.(qkv|proj)\.w").deltas()) == [
        f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in ("qkv", "proj")
    ]
    assert list(linearize(model, biases).deltas()) == [n for n in names if biases(n)]

    assert linearize(model).trainable == "all"
    assert linearize(model, "head").trainable == "head"
    assert linearize(model, biases).trainable.endswith("biases")


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("blocks[", r"'blocks\[' is no regular expression"),
        ("block9", r"'block9' matches no parameter; names look like blocks"),
        (lambda name: False, "matches no parameter; names look like"),
        (3, "trainable=3: expected None, a regular expression as a str, or a function"),
        (re.compile("head"), "a regular expression as a str"),
    ],
)
def test_bad_trainable(trainable, message):
    with pytest.raises(ArgumentError, match=message):
        linearize(vit(), trainable)


@pytest.mark.parametrize("k", [-1, 4])
def test_last_blocks_out_of_range(k):
    with pytest.raises(ArgumentError, match=rf"k={k}: expected 0 to 3, the number of blocks"):
        last_blocks(vit(), k)


def test_bad_models():
    with pytest.raises(UnsupportedError, match=r"Mlp has no `blocks`.*regular expression instead"):
        last_blocks(Mlp(), 1)
    with pytest.raises(
        ArgumentError, match=r"linearized already: pass the original, or model\.anc"
    ):
        linearize(linearize(Mlp()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match=r"model is a function: expected an nn\.Module"):
        linearize(rows)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="Flatten has no floating-point parameter"):
        linearize(nn.Flatten())


def test_frozen_parts_cost_nothing():
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    seen = {}

    def record(name):
        def hook(module, inputs, output):
            has_tangent = forward_ad.unpack_dual(output).tangent is not None
            seen[name] = (has_tangent, output.requires_grad)

        return hook

    for name, module in tangent.anchor.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(record(name))
    tangent(x)
    below = {n: s for n, s in seen.items() if re.match(r"patch_embed|norm_pre|blocks\.[01]\.", n)}
    assert len(below) > 20 and set(below.values()) == {(False, False)}
    for name in ("blocks.2.attn.qkv", "blocks.2.mlp.fc2", "norm", "head"):
        assert seen[name][0], name
    assert seen["blocks.2.norm1"][0]

    # The anchor itself is no leaf of the graph: only deltas are.
    tangent(x).sum().backward()
    assert all(p.grad is None for p in tangent.anchor.parameters())
    assert all(delta.grad is not None for delta in tangent.deltas().values())


def test_a_dual_forward_costs_three_times_the_products():
    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    model = vit().eval()
    tangent = moved(linearize(model))
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11 does not count the fast one of the CPU
        with reading_rows(model, 1):  # as the tangent model's last block
            plain = flops(lambda: model(images()))
        # Two products, not three: the images have no tangent. PyTorch's rule convolves zeros.
        patches = flops(lambda: model.patch_embed(images()))
    tangent(images())  # the first call also compares two forms of the last block
    assert flops(lambda: tangent(images())) == 3 * plain - patches


def test_frozen_attention_makes_no_tangent(monkeypatch):
    """A trained projection behind attention does not make attention dual."""
    calls = []
    import tangent_ops.ops.forward_ad as module

    original = module.scaled_dot_product_attention
    monkeypatch.setattr(
        module,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(1) or original(*args, **options),
    )
    model, x = vit(), images()
    moved(linearize(model, r"blocks\.2\.attn\.proj", check=False))(x)
    assert len(calls) == 0
    moved(linearize(model, r"blocks\.0\.attn\.proj", check=False))(x)
    assert len(calls) == 1  # of block 1; block 2 has the class token alone


# --- models of other shapes ------------------------------------------------------------------


class Rich(nn.Module):
    """Tied weights, keyword arguments, and a nested output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(12)
        self.embed = nn.Linear(6, 4)
        self.head = nn.Linear(6, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, *, scale: Tensor, flag: bool = True) -> dict:
        hidden = torch.tanh(self.embed(x))
        logits = self.head(torch.cat([hidden, hidden[:, :2]], 1)) * scale
        return {"logits": logits, "pair": (hidden, logits.argmax(-1)), "flag": flag, "none": None}


def test_tied_weights_keyword_arguments_and_nested_outputs():
    model, x = Rich(), torch.randn(3, 6, generator=generator(13))
    scale = torch.tensor([1.0, -2.0, 3.0, 0.5])
    tangent = moved(linearize(model))
    assert list(tangent.deltas()) == ["embed.weight", "embed.bias", "head.bias"]
    output = tangent(x, scale=scale, flag=False)

    run = oracle(model)(x, scale=scale)

    def floats(weights):
        found = run(weights)
        return found["logits"], found["pair"][0]

    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    deltas = {n: d.detach().double() for n, d in tangent.deltas().items()}
    value, value_t = torch.func.jvp(floats, (weights,), (deltas,))
    assert_near(
        (output["logits"], output["pair"][0]), (value[0] + value_t[0], value[1] + value_t[1])
    )
    assert torch.equal(output["pair"][1], value[0].argmax(-1))
    assert output["flag"] is False and output["none"] is None


def test_a_tied_weight_is_found_by_each_of_its_names():
    assert list(linearize(Rich(), r"^head\.").deltas()) == ["embed.weight", "head.bias"]


def test_an_output_of_unknown_type_is_refused():
    @dataclasses.dataclass
    class Output:
        logits: Tensor

    class Wrapped(Mlp):
        def forward(self, x):
            return Output(super().forward(x))

    with pytest.raises(UnsupportedError, match=r"returns a Output.*tuple, list or dict of tensors"):
        linearize(Wrapped())(rows())
