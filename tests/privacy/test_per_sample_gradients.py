"""Per-sample gradients: every layer of vision transformers, every mode, against one at a time."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import exact_vjp, images, moved, vit
from torch import Tensor, nn

pytest.importorskip("opacus", reason="the extra for privacy is not installed")

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import SwiGLUPacked
from timm.layers.norm import GroupNorm1, LayerNorm2d, RmsNorm
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.privacy.per_sample.gradients import (
    MODES,
    PerSampleGradients,
    clip_factors,
    per_sample_gradients,
)
from tangent_ops.privacy.per_sample.layers import ProductLayer, make_layer
from tangent_ops.profiling.memory import peak_bytes

LOSS = RescaledSquareLoss()


def by_loops(tangent, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """J(x_i)ᵀ c_i through torch.func.vjp of the anchor, one sample at a time, in float64."""
    names = list(tangent.deltas())
    each = [
        exact_vjp(tangent.anchor, names, c, x)
        for x, c in zip(inputs.split(1), cotangents.split(1), strict=True)
    ]
    return {name: torch.stack([one[name] for one in each]) for name in names}


def low_rank(tangent, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    bases = tangent.basis.tensors()
    return {
        name: value.flatten(2) @ bases[name].double().T if name in bases else value
        for name, value in samples.items()
    }


def check(tangent, inputs: Tensor, tolerance: float = 1e-6) -> None:
    """Samples, and the clipped sums of all modes."""
    own = PerSampleGradients(tangent, inputs)
    with torch.no_grad():
        logits = tangent(inputs)
    targets = torch.arange(len(inputs)) % logits.shape[1]
    cotangents = _cotangents(logits, targets)
    right = low_rank(tangent, by_loops(tangent, inputs, cotangents))
    size = torch.stack([value.flatten(1).square().sum(1) for value in right.values()]).sum(0).sqrt()
    found = own.samples(inputs, cotangents)
    clip = float(size.median())
    factors = (clip / size).clamp_max(1)
    for name, value in right.items():
        error = (found[name].double() - value).flatten(1).norm(dim=1)
        assert float((error / size).max()) <= tolerance, name
    for mode in MODES:
        sums = own.clipped_sum(inputs, targets, LOSS, clip, mode)
        assert sums.keys() == right.keys()
        for name, value in right.items():
            expected = torch.tensordot(factors, value, 1)
            error = float((sums[name].double() - expected).norm())
            assert error <= tolerance * float(factors @ size), (mode, name)


def _cotangents(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each sample's own loss, written out: (2/C)(f - M y)."""
    wanted = 15.0 * nn.functional.one_hot(targets, logits.shape[1])
    return (2 / logits.shape[1] * (logits.double() - wanted)).to(logits)


SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 3, "embed_dim": 12, "depth": 1}
TRANSFORMERS = {
    "plain": lambda: vit(depth=1, embed_dim=12, num_heads=2),
    "registers, RMS norm, SwiGLU, q and k normed": lambda: vit(
        depth=1,
        embed_dim=16,
        num_heads=2,
        reg_tokens=2,
        qk_norm=True,
        norm_layer=RmsNorm,
        mlp_layer=SwiGLUPacked,
    ),
    "pooled by attention": lambda: vit(
        depth=1, embed_dim=12, num_heads=2, global_pool="map", class_token=False
    ),
    "relative position bias (BEiT)": lambda: Beit(
        **SMALL, num_heads=2, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
    ),
    "rotary (EVA-02)": lambda: Eva(
        **SMALL | {"embed_dim": 16}, num_heads=2, use_rot_pos_emb=True, swiglu_mlp=True
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    torch.manual_seed(0)
    model = TRANSFORMERS[name]().double()
    check(moved(linearize(model)), images(3).double(), 1e-9)


@pytest.mark.parametrize("trainable", [r"^blocks|^norm|^head", r"cls_token|patch_embed|ls1"])
def test_some_parameters(trainable):
    tangent = moved(linearize(vit(depth=1, embed_dim=12, num_heads=2).double(), trainable))
    check(tangent, images(4).double(), 1e-9)


def test_low_rank_deltas():
    tangent = moved(linearize(vit(depth=1, embed_dim=12, num_heads=2).double(), rank=3))
    assert {"pos_embed", "patch_embed.proj.weight", "head.weight"} <= {*tangent.basis.names} | {
        "pos_embed"
    }
    check(tangent, images(3).double(), 1e-9)


def test_windows_in_the_batch_dimension():
    """Swin folds windows into the batch: its layers see more rows than samples."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=16,
        patch_size=2,
        num_classes=3,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
    ).double()
    check(moved(linearize(model)), images(3).double(), 1e-9)


def test_single_precision():
    check(moved(linearize(vit(depth=2))), images(4), 5e-6)


@pytest.mark.gpu
def test_on_a_gpu():
    """By the Triton kernels, whose products of float32 may be of TF32."""
    check(moved(linearize(vit(depth=2))).cuda(), images(4).cuda(), 5e-3)


def test_sixteen_bits_are_summed_in_float32():
    tangent = moved(linearize(vit(depth=1).bfloat16()))
    inputs = images(3).bfloat16()
    sums = PerSampleGradients(tangent, inputs).clipped_sum(inputs, torch.arange(3), LOSS, 1.0)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    norm = sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
    assert 0.1 < norm <= 3.0


class Row(nn.Module):
    """One layer, and logits of its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x)).flatten(1)
        return torch.stack([y.sum(1), (y * y).sum(1), y[:, 0]], dim=1)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["linear", "no bias", "layer norm", "bare norm", "scale", "group norm"]),
    count=st.integers(1, 4),
    middle=st.lists(st.integers(1, 9), max_size=2),
    width=st.integers(1, 8),
    out=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_layers(kind, count, middle, width, out, seed):
    torch.manual_seed(seed)
    shape = [4, 2 * width] if kind == "group norm" else [*middle, 2 * width]
    layer = {
        "linear": lambda: nn.Linear(2 * width, out),
        "no bias": lambda: nn.Linear(2 * width, out, bias=False),
        "layer norm": lambda: nn.LayerNorm(2 * width),
        "bare norm": lambda: nn.LayerNorm(2 * width, bias=False),
        "scale": lambda: LayerScale(2 * width),
        "group norm": lambda: nn.GroupNorm(2, 4),
    }[kind]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tangent = moved(linearize(Row(layer).double()), seed)
    check(tangent, torch.randn(count, *shape, dtype=torch.float64), 1e-9)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from([1, 2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    size=st.integers(3, 6),
    seed=st.integers(0, 99),
)
def test_convolutions(kind, kernel, stride, padding, groups, size, seed):
    torch.manual_seed(seed)
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1]
    layer = make(2, 4, kernel, stride, padding, groups=groups)
    tangent = moved(linearize(Row(layer).double()), seed)
    inputs = torch.randn(3, 2, *(size + k for k in range(kind)), dtype=torch.float64)
    check(tangent, inputs, 1e-9)


class ChannelsFirst(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Squared(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).square()


class Centring(nn.Conv2d):
    """The base's forward calls this, too."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Factored(nn.Linear):
    """The base's forward, of a weight that is made of other parameters."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        direction = self.weight
        del self.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.direction, self.length = direction, nn.Parameter(torch.ones(out, 1))

    @property
    def weight(self) -> Tensor:
        return self.length * self.direction


class Halved(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


def set_on_the_instance() -> nn.Module:
    layer = nn.Linear(5, 3)
    sine = types.MethodType(lambda self, x: torch.sin(F.linear(x, self.weight, self.bias)), layer)
    setattr(layer, "forward", sine)  # noqa: B010
    return layer


SUBCLASSES = {
    "timm's LayerNorm2d": lambda: LayerNorm2d(4),
    "timm's Conv2dSame": lambda: Conv2dSame(4, 3, 3, 2),
    "timm's StdConv2d": lambda: StdConv2d(4, 3, 3),
    "timm's StdConv2dSame": lambda: StdConv2dSame(4, 3, 3, 2),
    "timm's ScaledStdConv2d": lambda: ScaledStdConv2d(4, 3, 3),
    "timm's GroupNorm1": lambda: GroupNorm1(4),
    "channels-first linear": lambda: ChannelsFirst(4, 3),
    "squared linear": lambda: Squared(5, 3),
    "convolution of a centred weight": lambda: Centring(4, 3, 3),
    "linear of a factored weight": lambda: Factored(5, 3),
    "halved layer norm without bias": lambda: Halved(5, bias=False),
    "renamed linear": lambda: Renamed(5, 3),
    "forward of the instance": set_on_the_instance,
    "reflected padding": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "circular padding": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", groups=2),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_and_options_of_known_layers(name):
    torch.manual_seed(0)
    layer = SUBCLASSES[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tangent = moved(linearize(Row(layer).double()))
    check(tangent, torch.randn(3, 4, 6, 5, dtype=torch.float64), 1e-9)


def test_a_subclass_that_computes_what_its_base_does_is_not_run_anew():
    names = {"weight": "w", "bias": "b"}
    assert isinstance(make_layer(Renamed(6, 3), names, {}), ProductLayer)
    assert not isinstance(make_layer(Squared(6, 3), names, {}), ProductLayer)


class DataDependent(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if bool(input.sum() < 1e9) else input


def test_a_layer_that_functorch_cannot_map_is_named():
    tangent = linearize(Row(DataDependent(6, 3)))
    with pytest.raises(UnsupportedError, match=r"of a DataDependent need functorch.*`trainable`"):
        PerSampleGradients(tangent, torch.randn(2, 6))


def test_norms_of_many_positions_take_the_other_way():
    """More positions than T (in + out) <= in out allows: norms by the product, in chunks."""
    layer = nn.Linear(6, 4)
    check(moved(linearize(Row(layer).double())), torch.randn(3, 40, 6, dtype=torch.float64), 1e-9)


class Tied(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.one = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.one(x))
        return self.other(x).sum(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).sum(1)


@pytest.mark.parametrize("model", [lambda: Tied(1), lambda: Tied(2), Twice])
def test_tied_layers_and_layers_that_are_called_twice(model):
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 6, dtype=torch.float64)
    check(moved(linearize(model().double())), inputs, 1e-9)


class Attention(nn.Module):
    """PyTorch's attention uses its out_proj's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].sum(1)


def test_parameters_that_are_used_without_their_layer():
    torch.manual_seed(0)
    check(moved(linearize(Attention().double())), torch.randn(3, 4, 6, dtype=torch.float64), 1e-9)


class Keeping(nn.Module):
    """Computes something of its weight once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(4, 5)
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.weight.t() * 2
        return self.head(torch.tanh(x @ self.kept))


@pytest.mark.parametrize("checked", [True, False])
def test_a_model_that_keeps_what_it_computes_of_its_weights(checked):
    torch.manual_seed(0)
    tangent = moved(linearize(Keeping().double(), check=checked))
    check(tangent, torch.randn(3, 6, dtype=torch.float64), 1e-9)
    assert tangent.anchor.kept is None


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight.T


@pytest.mark.filterwarnings("ignore:no gradient in the ordinary model:UserWarning")
@pytest.mark.parametrize("model", [Centred, TwiceUsed])
def test_what_layers_do_not_tell_is_found_out(model):
    torch.manual_seed(0)
    tangent = linearize(model())
    with pytest.raises(UnsupportedError, match="layer"):
        PerSampleGradients(tangent, torch.randn(2, 6))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(6))
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token
        return self.layer(x if float(x.detach().sum()) < 1e9 else -x)


def test_parameters_that_functorch_cannot_reach_are_named():
    with pytest.raises(UnsupportedError, match=r"of token need functorch.*Leave them out"):
        PerSampleGradients(linearize(Branching()), torch.randn(2, 6))
    PerSampleGradients(linearize(Branching(), "layer"), torch.randn(2, 6))  # the way out


def test_refused():
    tangent = linearize(vit(depth=1))
    with pytest.raises(ArgumentError, match="floating-point"):
        PerSampleGradients(tangent, torch.zeros(2, 3, 16, 16, dtype=torch.long))
    tangent.set_grad_checkpointing()
    with pytest.raises(UnsupportedError, match="checkpointing"):
        PerSampleGradients(tangent, images(2))


def test_the_public_function():
    tangent = moved(linearize(vit(depth=1, embed_dim=12, num_heads=2).double(), "^blocks"))
    inputs, targets = images(3).double(), torch.tensor([4, 0, 2])
    found = per_sample_gradients(tangent, inputs, targets)
    assert list(found) == list(tangent.deltas())
    for i in range(3):
        loss = LOSS(tangent(inputs[i : i + 1]), targets[i : i + 1])
        right = torch.autograd.grad(loss, list(tangent.deltas().values()))
        for name, value in zip(found, right, strict=True):
            torch.testing.assert_close(found[name][i], value, rtol=1e-9, atol=1e-12)


def test_the_deltas_are_left_alone():
    tangent = moved(linearize(vit(depth=1)))
    before = tangent.delta_dict()
    own = PerSampleGradients(tangent, images(2))
    own.clipped_sum(images(2), torch.arange(2), LOSS, 1.0)
    assert all(torch.equal(before[n], delta) for n, delta in tangent.deltas().items())
    assert all(delta.grad is None for delta in tangent.deltas().values())
    assert not any(m._forward_hooks for m in tangent.modules())


@pytest.mark.parametrize("mode", MODES)
def test_no_sample_adds_more_than_the_bound(mode):
    """In float32, where norms are rounded, with samples from tame to huge."""
    tangent = moved(linearize(vit(depth=1)))
    own = PerSampleGradients(tangent, images(2))
    for scale in (1e-3, 1.0, 1e3):
        sums = own.clipped_sum(scale * images(1, seed=7), torch.tensor([1]), LOSS, 0.01, mode)
        norm = sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
        assert 0.0099 < norm <= 0.01


@pytest.mark.parametrize("width", [100, 30])  # by Gram matrices, and by the product
def test_norms_never_come_out_too_small(width):
    """Positions that cancel almost: the norm is small beside what is summed."""
    torch.manual_seed(0)
    half = torch.randn(64, 20, width)
    own = PerSampleGradients(linearize(Row(nn.Linear(width, width, bias=False))), half)
    a = torch.cat([half, half + 1e-3 * torch.randn_like(half)], dim=1)
    g = torch.randn(64, 20, width)
    g = torch.cat([g, -g], dim=1)
    found = own._layers["layer"].squared_norms(a, g).double()
    product = torch.einsum("nto,nti->noi", g.double(), a.double())
    right = product.flatten(1).square().sum(1)
    assert bool((found >= right).all())
    terms = (a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1).square()
    assert bool((found <= right + 1e-6 * terms).all())


def test_clip_factors():
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    right = torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(clip_factors(norms, 1.0), right, rtol=1e-12, atol=0)
    with pytest.raises(NonFiniteLossError):
        clip_factors(torch.tensor([1.0, float("nan")]), 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_memory(mode):
    """Only "per-sample" has something of the size batch times parameters."""
    torch.manual_seed(0)
    tangent = moved(linearize(Row(nn.Linear(400, 400))))
    inputs, targets = torch.randn(64, 2, 400), torch.zeros(64, dtype=torch.long)
    own = PerSampleGradients(tangent, inputs)
    samples = 64 * 400 * 400 * 4
    peak = peak_bytes(lambda: own.clipped_sum(inputs, targets, LOSS, 1.0, mode), "cpu")
    assert peak > samples if mode == "per-sample" else peak < samples / 5


def test_ghost_keeps_no_cotangents():
    torch.manual_seed(0)
    tangent = linearize(Row(nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))))
    inputs, targets = torch.randn(64, 32, 64), torch.zeros(64, dtype=torch.long)
    own = PerSampleGradients(tangent, inputs)
    peaks = {
        mode: peak_bytes(lambda mode=mode: own.clipped_sum(inputs, targets, LOSS, 1.0, mode), "cpu")
        for mode in ("bookkeeping", "ghost")
    }
    of_a_layer = 64 * 32 * 64 * 4
    assert peaks["ghost"] < peaks["bookkeeping"] - 5 * of_a_layer, peaks
