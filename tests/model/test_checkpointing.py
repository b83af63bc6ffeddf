"""Activation checkpointing of tangent models, and the memory of a training step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from small_models import (
    Computes,
    assert_near,
    exact_vjp,
    family,
    generator,
    images,
    levit,
    moved,
    swin,
    vit,
)
from torch import nn

from tangent_ops import last_blocks, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.model import checkpointing
from tangent_ops.model.checkpointing import find_blocks
from tangent_ops.profiling.memory import saved_bytes

MODELS = {
    "vit": lambda: (vit(), images()),
    "swin": lambda: (swin(depths=(1, 2)), images(size=32)),
    "resnet": lambda: (family("resnet10t"), images(size=32)),
}  # fmt: skip


def gradients(tangent, x):
    output = tangent(x)
    cotangent = torch.randn(output.shape, generator=generator(4))
    grads = torch.autograd.grad(output, list(tangent.deltas().values()), cotangent)
    return output.detach(), grads, cotangent


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without(name, monkeypatch) -> None:
    model, x = MODELS[name]()
    tangent = moved(linearize(model, check=False))
    plain = gradients(tangent, x)
    tangent.set_grad_checkpointing()
    repeats = []
    again = checkpointing._Again.__call__
    monkeypatch.setattr(
        checkpointing._Again, "__call__", lambda *args: repeats.append(1) or again(*args)
    )
    output, grads, cotangent = gradients(tangent, x)
    assert len(repeats) == len(find_blocks(model)) > 1
    assert_near(output, plain[0], 1e-6)
    exact = exact_vjp(model, list(tangent.deltas()), cotangent, x)
    assert_near(grads, [exact[n] for n in tangent.deltas()])


def test_what_is_repeated() -> None:
    model = vit()
    assert find_blocks(model) == list(model.blocks)
    model, _ = MODELS["swin"]()
    assert find_blocks(model) == [model.layers[0], *model.layers[1].blocks]  # one block; two
    resnet, _ = MODELS["resnet"]()
    layers = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
    assert find_blocks(resnet) == [block for layer in layers for block in layer]
    levit = family("levit_128s")  # whose attention has an nn.Sequential of its own
    assert set(levit.get_submodule("stages.0.blocks").children()) <= set(find_blocks(levit))
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


def test_timms_own_switch_goes_on_working() -> None:
    model, x = vit(), images()
    model.set_grad_checkpointing(True)
    tangent = moved(linearize(model))
    assert model.grad_checkpointing  # the original does not change
    assert tangent.grad_checkpointing
    right = gradients(tangent, x)
    tangent.set_grad_checkpointing(False)
    assert_near(right[1], gradients(tangent, x)[1])
    tangent.anchor.set_grad_checkpointing(True)
    assert_near(right[1], gradients(tangent, x)[1])
    assert tangent.grad_checkpointing
    other = pickle.loads(pickle.dumps(copy.deepcopy(tangent)))
    assert_near(right[1], gradients(other, x)[1])


def test_only_what_is_trained_is_pulled_back() -> None:
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 2)))
    tangent.set_grad_checkpointing()
    _, grads, cotangent = gradients(tangent, x)
    exact = exact_vjp(model, list(tangent.deltas()), cotangent, x)
    assert_near(grads, [exact[n] for n in tangent.deltas()])
    trunk, tail = tangent.split()
    assert tail.grad_checkpointing
    by_tail = torch.autograd.grad(tail(trunk(x)), list(tail.deltas().values()), cotangent)
    assert_near(by_tail, grads)


def test_low_rank_deltas() -> None:
    model, x = vit(), images()
    tangent = moved(linearize(model, rank=4))
    plain = gradients(tangent, x)
    tangent.set_grad_checkpointing()
    assert_near(gradients(tangent, x)[1], plain[1])


def test_autocast_is_that_of_the_forward_pass() -> None:
    model, x = vit(), images()
    tangent = moved(linearize(model, check=False))
    results, dtypes = [], []
    qkv = tangent.anchor.get_submodule("blocks.0.attn.qkv")
    qkv.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    for enable in (False, True):
        tangent.set_grad_checkpointing(enable)
        with torch.autocast("cpu", torch.bfloat16):
            output = tangent(x)
        cotangent = torch.ones_like(output)
        results.append(torch.autograd.grad(output, list(tangent.deltas().values()), cotangent))
    assert dtypes == [torch.bfloat16] * 3  # forward; forward and again
    one, other = (torch.cat([g.flatten() for g in grads]) for grads in results)
    # Both round intermediates to bfloat16, whose eps is 2**-8.
    assert float((one - other).norm()) <= 8 * 2**-8 * float(one.norm())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda linear, x: F.dropout(linear(x), 0.5, training=True), "draws random numbers"),
        (lambda linear, x: linear(x.mul_(2)), "in place"),
    ],
)
def test_a_block_that_cannot_be_repeated_is_refused(call, message) -> None:
    blocks = (Computes(lambda m, x: call(m.linear, x), linear=nn.Linear(4, 4)) for _ in range(2))
    tangent = linearize(nn.Sequential(*blocks))
    tangent.set_grad_checkpointing()
    with pytest.raises(UnsupportedError, match=message):
        tangent(torch.ones(2, 4))


def test_compiled_code_does_without() -> None:
    model, x = vit(depth=1), images()
    tangent = moved(linearize(model))
    _, grads, cotangent = gradients(tangent, x)
    tangent.set_grad_checkpointing()
    output = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)
    assert_near(torch.autograd.grad(output, list(tangent.deltas().values()), cotangent), grads)


def test_a_repeat_neither_finds_nor_leaves_what_a_block_keeps() -> None:
    model, x = levit(), images(size=32).double()
    tangent = moved(linearize(model))
    cotangent = torch.randn(2, 5, generator=generator(4)).double()
    leaves = list(tangent.deltas().values())
    grads = torch.autograd.grad(tangent(x), leaves, cotangent)
    tangent.set_grad_checkpointing()
    output = tangent(x)
    for _ in range(2):
        again = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        assert_near(again, grads)
    assert not any(getattr(m, "attention_bias_cache", None) for m in tangent.anchor.modules())


def test_a_blocks_own_forward_stays() -> None:
    """As accelerate's hooks: a forward of the instance, which calls that of the class."""
    model = vit(depth=2)
    block: Any = model.get_submodule("blocks.0")
    within = block.forward
    block.forward = lambda x: within(x) + 1
    tangent = linearize(model, check=False)
    copy = tangent.anchor.get_submodule("blocks.0")
    own = copy.forward
    tangent.set_grad_checkpointing()
    images = torch.randn(1, 3, 16, 16, generator=generator())
    first = tangent(images)
    assert copy.forward is own
    assert torch.equal(tangent(images), first)


def test_second_derivatives_are_refused() -> None:
    tangent = moved(linearize(vit()))
    tangent.set_grad_checkpointing()
    leaves = list(tangent.deltas().values())
    with pytest.raises(UnsupportedError, match="checkpointed block"):
        torch.autograd.grad(tangent(images()).square().sum(), leaves, create_graph=True)


def test_a_model_without_blocks_is_refused() -> None:
    tangent = linearize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(UnsupportedError, match="no blocks"):
        tangent.set_grad_checkpointing()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_models_own_checkpointing_is_never_silently_wrong(reentrant) -> None:
    def call(m, x):
        inner = lambda x: m.first(x).tanh()  # noqa: E731
        return m.last(torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant))

    model = Computes(call, first=nn.Linear(4, 8), last=nn.Linear(8, 2))
    with pytest.raises((RuntimeError, UserWarning)):
        tangent = moved(linearize(model))
        tangent(torch.ones(3, 4)).square().sum().backward()


@pytest.mark.parametrize("checked", [False, True])
def test_a_reentrant_checkpoint_around_the_model(checked) -> None:
    """PyTorch switches forward mode off in it, where the output was f(x; w0) without J(x) Δw."""
    tangent, x = moved(linearize(vit(), check=checked)), images()
    output, grads, cotangent = gradients(tangent, x)
    leaf = x.clone().requires_grad_()
    again = torch.utils.checkpoint.checkpoint(tangent, leaf, use_reentrant=True)
    assert torch.equal(again, output)
    again.backward(cotangent)
    found = [delta.grad for delta in tangent.deltas().values()]
    assert_near(found, grads, 1e-5)


def kept(model: nn.Module) -> int:
    """Bytes saved for the backward pass, without the model's own parameters."""

    def forward() -> None:
        assert model(images(size=224)).requires_grad

    return saved_bytes(forward, exclude=model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vit_small_keeps_what_fine_tuning_keeps(checkpointing) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").eval()
    model.set_grad_checkpointing(checkpointing)
    tangent = linearize(model, example=images(size=224))
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.fill_(0.01)
    found, ordinary = kept(tangent), kept(model)
    print(f"{found / 1e6:.1f} MB, fine-tuning {ordinary / 1e6:.1f} MB")
    assert found <= 1.02 * ordinary
