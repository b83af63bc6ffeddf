"""linearize: value, tangent and gradients against float64, and everything around them."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    VIT,
    assert_near,
    double,
    exact_jvp,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    oracle,
    vit,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops import Delta, last_blocks, linearize
from tangent_ops.errors import ArgumentError, DeltaError, UnsupportedError, ZeroHeadWarning
from tangent_ops.profiling.memory import saved_bytes

# name: timm architecture, options that make it small, image size
FAMILIES = {
    "plain": ("vit_small_patch16_224", VIT, 16),
    "qk_norm": ("vit_small_patch16_224", {**VIT, "qk_norm": True, "scale_attn_norm": True}, 16),
    "registers": ("vit_small_patch16_224", {**VIT, "reg_tokens": 2, "global_pool": "map"}, 16),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 16),
    "rope": ("eva02_tiny_patch14_224", {**VIT, "depth": 2}, 16),
    "bias": ("beit_base_patch16_224", {**VIT, "depth": 2}, 16),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 12,
            "depths": (2, 2),
            "num_heads": (2, 3),
        },
        32,
    ),
    "batch norm": ("test_resnet", {}, 32),
    "convolutions": ("test_convnext", {}, 32),
}


class Mlp(nn.Module):
    """A quick model for what does not depend on the architecture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 4, generator=generator(5))


# --- value, tangent, gradient ----------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_value_tangent_and_gradient_of_real_architectures(name):
    architecture, options, size = FAMILIES[name]
    model, x = family(architecture, **options), images(2, size)
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
        # Against the largest of all: some, as the key's bias, are zero but for rounding.
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


def test_linear_in_the_deltas_of_a_transformer():
    model, x = vit(), images()
    one, two, both = (moved(linearize(model), seed) for seed in (7, 8, 9))
    both.load_delta_dict({n: 3 * d - 0.5 * two.deltas()[n] for n, d in one.delta_dict().items()})
    tangents = [exact_jvp(model, t.deltas(), x)[1] for t in (one, two)]
    assert_near(both(x), oracle(model)(x)({}) + 3 * tangents[0] - 0.5 * tangents[1])


def test_float64_and_bfloat16():
    model, x = vit(), images()
    tangent = moved(linearize(copy.deepcopy(model).double()))
    exact = exact_jvp(model, tangent.deltas(), x)
    assert_near(tangent.primal_and_tangent(x.double()), exact, 1e-12)

    half = linearize(copy.deepcopy(model).bfloat16())
    half.load_delta_dict(dict(tangent.delta_dict()))
    assert_near(half.primal_and_tangent(x.bfloat16()), exact, 0.05)  # 2^-8, a few times


def test_autocast():
    model, x = vit(), images()
    tangent = moved(linearize(model))
    with torch.autocast("cpu", torch.bfloat16):
        output = tangent(x)
    assert_near(output, sum(exact_jvp(model, tangent.deltas(), x)), 0.05)
    output.float().sum().backward()
    assert all(delta.grad is not None for delta in tangent.deltas().values())


def test_under_no_grad_inference_mode_and_torch_func():
    model, x = vit(), images()
    tangent = moved(linearize(model))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    with torch.no_grad():
        assert_near(tangent(x), exact)
        assert not tangent(x).requires_grad
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


# --- the anchor ------------------------------------------------------------------------------


def test_the_model_is_left_alone_and_later_changes_do_not_reach_the_anchor():
    model, x = vit(drop_rate=0.5).train(), images()
    before = copy.deepcopy(model.state_dict())
    tangent = moved(linearize(model))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    tangent(x).sum().backward()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_near(tangent(x), exact)


def test_the_anchor_stays_in_eval_mode():
    options = {"drop_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}
    model, x = vit(**options, drop_path_rate=0.5), images()
    tangent = moved(linearize(model.train()))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    nn.Sequential(tangent).train()
    assert tangent.training
    assert not any(module.training for module in tangent.anchor.modules())
    assert_near(tangent(x), exact)


def test_batch_norm_uses_its_running_statistics_and_keeps_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2))
    model(3 * images(4) + 1)  # statistics other than 0 and 1
    tangent = moved(linearize(model)).train()
    before = copy.deepcopy(tangent.anchor.state_dict())
    x = images(3)
    assert_near(tangent(x), sum(exact_jvp(model, tangent.deltas(), x)))
    after = tangent.anchor.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items())


def test_gradient_checkpointing_is_switched_off_in_the_anchor():
    model, x = vit(), images()
    model.set_grad_checkpointing()
    tangent = moved(linearize(model, "head|blocks"))
    tangent(x).sum().backward()
    name = "blocks.0.mlp.fc1.weight"
    exact = exact_vjp(vit(), [name], torch.ones(2, 5), x)[name]
    assert_near(tangent.deltas()[name].grad, exact)
    assert model.grad_checkpointing


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
        plain = flops(lambda: model(images()))
        patches = flops(lambda: model.patch_embed(images()))  # two products, not three
    assert flops(lambda: tangent(images())) == 3 * plain - patches


def test_a_training_step_keeps_no_more_than_an_ordinary_one():
    """Activations saved for the backward pass, in bytes; the models' own parameters not counted."""

    def kept(model: nn.Module) -> int:
        def forward() -> None:
            assert model(images(count=4)).requires_grad

        return saved_bytes(forward, exclude=model.parameters())

    model = vit(init_values=None).eval()
    assert kept(moved(linearize(model))) <= 1.02 * kept(model)


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
    moved(linearize(model, r"blocks\.1\.attn\.proj", check=False))(x)
    assert len(calls) == 1  # of block 2


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


def test_multi_head_attention_of_torch():
    torch.manual_seed(14)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16, generator=generator(15))
    tangent = moved(linearize(layer))
    found = tangent.primal_and_tangent(x)
    torch.backends.mha.set_fastpath_enabled(False)  # it has no derivative: the oracle goes without
    try:
        assert_near(found, exact_jvp(layer, tangent.deltas(), x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- deltas ----------------------------------------------------------------------------------


def test_delta_dict_round_trip():
    model, x = vit(), images()
    one, two = moved(linearize(model, "head|norm")), linearize(model, "head|norm")
    taken = one.delta_dict()
    assert isinstance(taken, Delta) and taken.meta is not None
    assert taken.meta.anchor == one.fingerprint == two.fingerprint
    assert (taken.meta.model, taken.meta.trainable) == ("VisionTransformer", "head|norm")
    assert not any(value.requires_grad for value in taken.values())
    held = two.deltas()["head.bias"]
    two.load_delta_dict(taken)
    assert torch.equal(one(x), two(x))
    assert two.deltas()["head.bias"] is held  # in place: an optimizer keeps it

    before = one(x)
    for value in taken.values():
        value.zero_()
    assert torch.equal(one(x), before)  # a copy


def test_model_name_of_timm():
    model = family("test_resnet")
    assert linearize(model).model_name == "test_resnet"


def test_load_delta_dict_refuses_and_changes_nothing():
    tangent = moved(linearize(Mlp()))
    good = tangent.delta_dict()
    other = Mlp()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    wrong_anchor = moved(linearize(other), seed=20).delta_dict()

    def changed(**tensors):
        return {**{n: d + 1 for n, d in good.items()}, **tensors}

    broken = torch.zeros(3)
    broken[1] = float("nan")
    without = changed()
    del without["head.bias"]
    cases = [
        (wrong_anchor, "belongs to another anchor"),
        (without, r"missing head\.bias"),
        (changed(extra=torch.zeros(1)), "unexpected extra"),
        (changed(**{"head.bias": torch.zeros(4)}), r"head\.bias has shape \(4,\), expected \(3,\)"),
        (changed(**{"head.bias": broken}), r"not finite in head\.bias"),
        (changed(**{"head.bias": 3}), "to a int, not to a tensor"),
    ]
    for delta, message in cases:
        with pytest.raises(DeltaError, match=message):
            tangent.load_delta_dict(delta)
        assert all(torch.equal(d, good[n]) for n, d in tangent.deltas().items())
    tangent.load_delta_dict(dict(wrong_anchor))  # nothing known of its anchor
    assert torch.equal(tangent.deltas()["head.bias"], wrong_anchor["head.bias"])


def test_state_dict_has_anchor_and_deltas():
    model = vit()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    names = {f"delta.{n}" for n in tangent.deltas()} | {f"anchor.{n}" for n in model.state_dict()}
    assert tangent.state_dict().keys() == names
    assert {n for n, p in tangent.named_parameters() if p.requires_grad} == {
        n for n in names if n.startswith("delta.")
    }
    other = linearize(vit(num_classes=5, init_values=0.5), last_blocks(model, 1))
    stale = other.fingerprint
    other.load_state_dict(tangent.state_dict())
    assert torch.equal(other(images()), tangent(images()))
    assert other.fingerprint == tangent.fingerprint != stale


@pytest.mark.parametrize("through", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_deepcopy_and_pickle(through):
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    twin = through(tangent)
    assert torch.equal(twin(x), tangent(x))
    assert twin.fingerprint == tangent.fingerprint
    assert twin.trainable == tangent.trainable
    before = tangent(x)
    with torch.no_grad():
        twin.deltas()["head.bias"].add_(1)
        twin.anchor.head.bias.add_(1)
    assert torch.equal(tangent(x), before)
    assert not torch.equal(twin(x), before)


def test_torch_save():
    tangent, x = moved(linearize(vit())), images()
    file = io.BytesIO()
    torch.save(tangent, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), tangent(x))


def test_fingerprint_is_the_anchors_content():
    model = Mlp()
    fingerprint = linearize(model).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert linearize(copy.deepcopy(model), "head").fingerprint == fingerprint
    assert moved(linearize(model)).fingerprint == fingerprint  # deltas are not part of it

    code = "from test_linearize import *; print(linearize(Mlp()).fingerprint)"
    fresh = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == fingerprint

    bits = model.head.bias.data.view(torch.int32)
    bits[0] ^= 1
    assert linearize(model).fingerprint != fingerprint
    bits[0] ^= 1
    assert linearize(model).fingerprint == fingerprint


def test_fingerprint_follows_a_change_of_dtype():
    tangent = linearize(Mlp())
    single = tangent.fingerprint
    assert tangent.double().fingerprint == linearize(Mlp().double()).fingerprint != single


# --- warnings, summary -----------------------------------------------------------------------


def zeroed(model, *heads):
    with torch.no_grad():
        for head in heads:
            getattr(model, head).weight.zero_()
    return model


def test_zero_head_warns_at_the_caller():
    with pytest.warns(ZeroHeadWarning, match=r"only the head can learn.*fit_head") as caught:
        linearize(zeroed(vit(), "head"))
    assert caught[0].filename == __file__
    distilled = zeroed(family("deit_tiny_distilled_patch16_224", **VIT), "head", "head_dist")
    with pytest.warns(ZeroHeadWarning):
        linearize(distilled)


def test_no_warning_where_the_head_is_trained_alone_or_not_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(zeroed(vit(), "head"), r"^head\.")
        linearize(vit())
        linearize(zeroed(family("deit_tiny_distilled_patch16_224", **VIT), "head"))
        linearize(vit(num_classes=0))
        linearize(Mlp())


def test_summary_adds_up(capsys):
    model = vit()
    linearize(model, last_blocks(model, 1)).summary()
    printed = capsys.readouterr().out
    assert "VisionTransformer" in printed and last_blocks(model, 1) in printed
    table = {}
    for line in printed.splitlines()[2:]:
        group, *numbers = line.split()
        table[group] = [int(number.replace(",", "")) for number in numbers]
    total = table.pop("total")
    assert total == [sum(column) for column in zip(*table.values(), strict=True)]
    assert sum(total) == sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[2].parameters())
    assert table["blocks.2"] == [block, 0] and table["blocks.1"] == [0, block]
    head = sum(p.numel() for p in model.head.parameters())
    norm = sum(p.numel() for p in model.norm.parameters())
    assert total[0] == block + head + norm


def test_nothing_that_the_model_keeps_in_eval_mode_is_believed():
    """LeViT keeps its gathered attention biases; kept ones have no tangent."""
    options = {"embed_dim": (32,), "num_heads": (2,), "key_dim": 16, "depth": (2,)}
    # float64: the biases have small gradients, of which float32's rounding leaves four digits.
    model = family("levit_128s", img_size=32, **options).double().eval()
    x = images(size=32).double()
    exact_of_fresh = copy.deepcopy(model)
    model(x)  # with gradients, as one would by mistake
    tangent = moved(linearize(model))
    exact = exact_jvp(exact_of_fresh, tangent.deltas(), x)
    for run in (lambda: None, lambda: tangent.anchor(x), lambda: None):
        run()
        assert_near(tangent.primal_and_tangent(x), exact)
    names = [name for name in tangent.deltas() if name.endswith("attention_biases")]
    cotangent = images(size=32)[:, 0, 0, :5].double()
    grads = torch.autograd.grad(tangent(x), [tangent.deltas()[n] for n in names], cotangent)
    answers = exact_vjp(copy.deepcopy(exact_of_fresh), names, cotangent, x)
    assert_near(grads, [answers[name] for name in names])
    assert not model.training
    kept = [
        m.attention_bias_cache
        for m in tangent.anchor.modules()
        if "attention_bias_cache" in vars(m)
    ]
    assert kept and not any(kept)
