"""16-bit anchors, autocast and loss scaling: as close to float64 as PyTorch's own code."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    VIT,
    assert_near,
    exact_jvp,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    vit,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

from tangent_ops import compose, fit, linearize, load_delta, save_delta
from tests.ops.oracle import assert_as_good_as


@dataclass(frozen=True)
class Precision:
    """Dtype of the anchor, and of autocast, or None."""

    anchor: torch.dtype
    autocast: torch.dtype | None = None

    def context(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.autocast)


PRECISIONS = {
    "bf16 autocast": Precision(torch.float32, torch.bfloat16),
    "fp16 autocast": Precision(torch.float32, torch.float16),
    "bf16 anchor": Precision(torch.bfloat16),
    "fp16 anchor": Precision(torch.float16),
}
SMALL = {**VIT, "depth": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention, layer norm, gelu": lambda: vit(depth=2),
    "attention with a bias": lambda: family("beit_base_patch16_224", **SMALL),
    "softmax": lambda: family("cait_xxs24_224", **{**SMALL, "depth": 1}),
    "convolutions": lambda: family("test_convnext"),
}


def eager(model: nn.Module, deltas: dict[str, Tensor], x: Tensor, cotangent: Tensor, precision):
    """Value, tangent and gradients of the deltas by torch.func.jvp and MATH in that precision."""
    weights = {n: model.get_parameter(n).detach() for n in deltas}
    with precision.context(), sdpa_kernel(SDPBackend.MATH):
        directions = {n: d.to(weights[n].dtype) for n, d in deltas.items()}
        value, tangent, *_ = torch.func.jvp(
            lambda w: functional_call(model, w, (x,)), (weights,), (directions,)
        )
    gradients = torch.autograd.grad(tangent, list(deltas.values()), cotangent.to(tangent.dtype))
    return value.detach(), tangent.detach(), joined(gradients)


def joined(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_as_good_as_eager_pytorch(model, name):
    precision = PRECISIONS[name]
    anchor = MODELS[model]().to(precision.anchor).eval()
    x = images(2, 32 if model == "convolutions" else 16).to(precision.anchor)
    tangent = moved(linearize(anchor))
    deltas = tangent.deltas()
    assert {d.dtype for d in deltas.values()} == {torch.float32}
    with precision.context():
        value, value_t = tangent.primal_and_tangent(x)
    cotangent = torch.randn(value.shape, generator=generator(6))
    gradients = torch.autograd.grad(value_t, list(deltas.values()), cotangent.to(value_t.dtype))
    assert {g.dtype for g in gradients} == {torch.float32}

    exact = exact_jvp(anchor, deltas, x)
    exact_gradients = exact_vjp(anchor, list(deltas), cotangent, x)
    given = {n: d.detach().requires_grad_() for n, d in deltas.items()}
    theirs = eager(anchor, given, x, cotangent, precision)
    found = (value.detach(), value_t.detach(), joined(gradients))
    right = (*exact, joined(exact_gradients[n] for n in deltas))
    assert_as_good_as(found, right, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_deltas_of_a_16_bit_anchor(dtype):
    model, x = vit().to(dtype), images().to(dtype)
    tangent = moved(linearize(model, rank=3))
    full = dict(tangent.full_delta_dict())
    assert {t.dtype for t in (*full.values(), *tangent.basis.tensors().values())} == {torch.float32}
    same = linearize(model)
    same.load_delta_dict(full)
    with torch.no_grad():
        found, expected = tangent.primal_and_tangent(x), same.primal_and_tangent(x)
    assert_as_good_as(found, exact_jvp(model, full, x), expected)


# --- the deltas' dtype -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [nn.Module.half, nn.Module.bfloat16, lambda t: t.to("cpu", torch.bfloat16), nn.Module.double],
)
@pytest.mark.parametrize("rank", [None, 3])
def test_deltas_and_bases_are_never_of_16_bits(convert, rank):
    tangent = moved(linearize(vit(), rank=rank))
    before, held = tangent.delta_dict(), tangent.deltas()["head.bias"]
    dtype = convert(tangent).anchor.head.bias.dtype
    assert dtype != torch.float32
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (*tangent.deltas().values(), *tangent.basis.tensors().values())
    assert {t.dtype for t in tensors} == {expected}
    assert all(torch.equal(d, before[n]) for n, d in tangent.deltas().items())  # not rounded
    assert tangent.deltas()["head.bias"] is held
    assert tangent(images().to(dtype)).dtype == dtype


def test_files_of_16_bit_deltas_still_load(tmp_path):
    path, model = tmp_path / "old.safetensors", vit().bfloat16()
    tangent = moved(linearize(model))
    old = {n: d.bfloat16() for n, d in tangent.delta_dict().items()}  # as 0.1 wrote them
    save_delta(old, path, meta=tangent.delta_dict().meta)
    fresh = linearize(model)
    fresh.load_delta_dict(compose([load_delta(path, anchor=fresh.fingerprint)]))
    assert all(torch.equal(d, old[n].float()) for n, d in fresh.deltas().items())


def test_state_dict_of_a_16_bit_anchor():
    one, two = moved(linearize(vit().half())), linearize(vit(init_values=0.5).half())
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(images().half()), one(images().half()))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_too_small_for_bfloat16_are_not_lost(optimizer):
    layer = nn.Linear(4, 3).bfloat16()
    tangent = linearize(layer)
    delta = tangent.deltas()["bias"]
    delta.data.fill_(1.0)
    steps = optimizer([delta], lr=1e-4)
    for _ in range(20):  # of 1e-4 each; bfloat16 has nothing between 1 and 1 - 4e-3
        steps.zero_grad()
        tangent(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        steps.step()
    moved_by = 1 - delta.detach()
    assert ((moved_by > 1.9e-3) & (moved_by < 2.4e-3)).all()  # AdamW decays by 1e-2 of lr, too


# --- training --------------------------------------------------------------------------------


def batch(count: int = 20) -> TensorDataset:
    labels = torch.arange(count) % 5
    return TensorDataset(images(count) + 0.3 * labels[:, None, None, None], labels)


def test_fit_of_a_bfloat16_anchor_follows_the_float64_one():
    options = {"epochs": 3, "lr": 3e-3, "optimizer": "adamw", "progress": False}
    model = vit().bfloat16()
    inputs, labels = batch().tensors
    exact = linearize(copy.deepcopy(model).double())
    expected = fit(exact, TensorDataset(inputs.bfloat16().double(), labels), **options)
    assert expected.loss[-1] < 0.8 * expected.loss[0]
    tangent = linearize(model)
    history = fit(tangent, TensorDataset(inputs.bfloat16(), labels), **options)
    assert {d.dtype for d in tangent.deltas().values()} == {torch.float32}
    assert history.loss == pytest.approx(expected.loss, rel=0.02)  # 2^-8, a few times


SCALED = [PRECISIONS["fp16 autocast"], PRECISIONS["fp16 anchor"]]


def backward(tangent, precision: Precision, scaler, factor: float) -> None:
    inputs, labels = images(4), torch.arange(4)
    with precision.context():
        output = tangent(inputs.to(precision.anchor))
    scaler.scale(factor * F.cross_entropy(output.float(), labels)).backward()


def exact_gradients(tangent, precision: Precision) -> Tensor:
    """Gradients of the cross entropy, in float64."""
    anchor, x = tangent.anchor, images(4).to(precision.anchor)
    logits = torch.add(*exact_jvp(anchor, tangent.deltas(), x)).requires_grad_()
    (cotangent,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), logits)
    gradients = exact_vjp(anchor, list(tangent.deltas()), cotangent, x)
    return joined(gradients[n] for n in tangent.deltas())


@pytest.mark.parametrize("precision", SCALED, ids=["autocast", "anchor"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_scaler_saves_small_gradients_and_steps(precision, rank):
    tangent = moved(linearize(vit().to(precision.anchor), "head|attn", rank=rank))
    deltas = tangent.deltas()
    small = 1e-7  # of the loss; alone, its gradients vanish in float16
    optimizer = torch.optim.SGD(deltas.values(), lr=1.0 / small)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    backward(tangent, precision, scaler, small)
    scaler.unscale_(optimizer)
    found = joined(d.grad for d in deltas.values())
    if rank is None:
        exact = small * exact_gradients(tangent, precision)
        assert_near(found, exact, 5e-3)  # 2^-11, a few times
    before = joined(deltas.values())
    scaler.step(optimizer)
    scaler.update()
    assert_near(joined(deltas.values()), before.double() - found.double() / small, 1e-6)

    optimizer.zero_grad()
    backward(tangent, precision, torch.amp.GradScaler("cpu", enabled=False), small)
    unscaled = joined(d.grad for d in deltas.values())
    assert float((unscaled - found).norm()) > 0.2 * float(found.norm())


@pytest.mark.parametrize("precision", SCALED, ids=["autocast", "anchor"])
def test_a_scaler_skips_a_step_that_overflows(precision):
    tangent = moved(linearize(vit().to(precision.anchor)))
    optimizer = torch.optim.SGD(tangent.deltas().values(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = tangent.delta_dict()
    backward(tangent, precision, scaler, 1.0)
    gradients = joined(d.grad for d in tangent.deltas().values())
    assert not gradients.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(d, before[n]) for n, d in tangent.deltas().items())
