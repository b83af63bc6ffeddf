"""Per-sample gradients of vision transformers in every mode, against one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample_oracle import LOSS, Row, check
from small_models import Computes, images, moved, vit
from timm.layers.mlp import SwiGLUPacked
from timm.layers.norm import RmsNorm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.privacy.per_sample.gradients import (
    MODES,
    PerSampleGradients,
    clip_factors,
    per_sample_gradients,
)
from tangent_ops.profiling.memory import peak_bytes

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


@pytest.mark.parametrize("given", [False, True])
def test_cores(given):
    model = vit(depth=1, embed_dim=12, num_heads=2).double()
    cores: Any = {} if given else (3, 2)
    if given:  # of a convolution, of a layer, and of a parameter without a layer
        names = ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"]
        for name in names:
            rows, columns = model.get_parameter(name).flatten(1).shape
            cores[name] = torch.eye(rows, 1), torch.eye(2, columns)
    tangent = moved(linearize(model, core=cores))
    assert tangent.left.names
    check(tangent, images(3).double(), 1e-9)


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
    """With the Triton kernels, which may multiply float32 in TF32."""
    check(moved(linearize(vit(depth=2))).cuda(), images(4).cuda(), 5e-3)


def test_sixteen_bits_are_summed_in_float32():
    tangent = moved(linearize(vit(depth=1).bfloat16()))
    inputs = images(3).bfloat16()
    sums = PerSampleGradients(tangent, inputs).clipped_sum(inputs, torch.arange(3), LOSS, 1.0)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    norm = sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
    assert 0.1 < norm <= 3.0


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


def twice():
    return Computes(lambda m, x: m.layer(torch.tanh(m.layer(x))).sum(1), layer=nn.Linear(6, 6))


@pytest.mark.parametrize("model", [lambda: Tied(1), lambda: Tied(2), twice])
def test_tied_layers_and_layers_that_are_called_twice(model):
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 6, dtype=torch.float64)
    check(moved(linearize(model().double())), inputs, 1e-9)


def test_parameters_that_are_used_without_their_layer():
    """PyTorch's attention uses its out_proj's weight without calling it."""
    torch.manual_seed(0)
    model = Computes(
        lambda m, x: m.attention(x, x, x, need_weights=False)[0].sum(1),
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    check(moved(linearize(model.double())), torch.randn(3, 4, 6, dtype=torch.float64), 1e-9)


class Keeping(nn.Module):
    """Keeps a tensor that it computes from its weight in the first call."""

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


@pytest.mark.filterwarnings("ignore:no gradient in the ordinary model:UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.layer(x - x.mean(0)),  # centred by the batch
        lambda m, x: m.layer(x) + x @ m.layer.weight.T,  # the weight is used twice
    ],
)
def test_what_layers_do_not_tell_is_found_out(call):
    torch.manual_seed(0)
    tangent = linearize(Computes(call, layer=nn.Linear(6, 3)))
    with pytest.raises(UnsupportedError, match="layer"):
        PerSampleGradients(tangent, torch.randn(2, 6))


def test_parameters_that_functorch_cannot_reach_are_named():
    def branching(m, x):
        x = x + m.token
        return m.layer(x if float(x.detach().sum()) < 1e9 else -x)

    model = Computes(branching, token=nn.Parameter(torch.ones(6)), layer=nn.Linear(6, 3))
    with pytest.raises(UnsupportedError, match=r"of token need functorch.*Leave them out"):
        PerSampleGradients(linearize(model), torch.randn(2, 6))
    PerSampleGradients(linearize(model, "layer"), torch.randn(2, 6))  # the way out


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
    """In float32, where norms are rounded, for inputs of several sizes."""
    tangent = moved(linearize(vit(depth=1)))
    own = PerSampleGradients(tangent, images(2))
    for scale in (1e-3, 1.0, 1e3):
        sums = own.clipped_sum(scale * images(1, seed=7), torch.tensor([1]), LOSS, 0.01, mode)
        norm = sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
        assert 0.0099 < norm <= 0.01


@pytest.mark.parametrize("width", [100, 30])  # by Gram matrices, and by the product
def test_norms_never_come_out_too_small(width):
    """The positions nearly cancel, so that the norm is small beside its terms."""
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
    """Only "per-sample" allocates memory of the size batch times parameters."""
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
