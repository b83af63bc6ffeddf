"""timm's vision transformers with random weights: what of them is compared, what they cost."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import forward_flops, vit_cost
from benchmarks.suite.case import Cost
from tangent_ops.model.features import Tail, blocks_of

Weights = dict[str, Tensor]


def random_vit(name: str) -> nn.Module:
    """In eval mode and frozen, on the CPU in float32; weights from torch's default generator."""
    model = timm.create_model(name).eval().requires_grad_(False)
    for parameter in model.parameters():  # fresh ones are zeros and ones too often
        parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def random_batch(model: Any, images: int) -> tuple[Tensor, Tensor]:
    """Images (images, 3, H, W) of the model's size and targets (images,), on the CPU."""
    inputs = torch.randn(images, *model.pretrained_cfg["input_size"])
    return inputs, torch.randint(model.num_classes, (images,))


def representatives(model: nn.Module) -> list[str]:
    """Parameters whose gradients are compared: one of each kind, those of TAFT-1 first."""
    end = f"blocks.{len(blocks_of(model)) - 1}"
    late = [f"{end}.attn.qkv.weight", f"{end}.mlp.fc2.weight", "norm.weight", "head.weight"]
    early = ["patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"]
    return [*late, *early]


def torch_jvp(model: nn.Module, images: Tensor, delta: Weights) -> tuple[Tensor, Tensor]:
    """f and JΔw by PyTorch alone, whose only attention with a forward derivative is MATH."""
    weights = {name: model.get_parameter(name) for name in delta}

    def run(weights: Weights) -> Tensor:
        return functional_call(model, weights, images)

    with sdpa_kernel(SDPBackend.MATH):
        f, tangent, *_ = torch.func.jvp(run, (weights,), (delta,))
    return f, tangent


def cost(
    question: str,
    name: str,
    dtype: torch.dtype,
    images: int,
    *,
    last_block: bool = False,
    trunk: bool = True,
) -> Cost:
    """The least work of a pass or a step of a timm model.

    Args:
        question: as in ``roofline.vit_cost``.
        name: of the model.
        dtype: of its weights.
        images: of one call.
        last_block: whether the last block, norm and head alone are trained: the trunk below then
            runs forward alone.
        trunk: whether it runs at all.
    """
    asked = _whole(question, name, dtype, images)
    if not last_block:
        return asked
    whole, tail = _whole("primal", name, dtype, images), _tail(name, dtype, images)
    flops, weights = tail.flops / whole.flops, tail.bytes / whole.bytes
    return Cost(
        flops * asked.flops + trunk * (whole.flops - tail.flops),
        weights * asked.bytes + trunk * (whole.bytes - tail.bytes),
    )


@functools.cache
def _whole(question: str, name: str, dtype: torch.dtype, images: int) -> Cost:
    model = _hollow(name, dtype)
    return vit_cost(question, model, images, model.pretrained_cfg["input_size"][-1])


@functools.cache
def _tail(name: str, dtype: torch.dtype, images: int) -> Cost:
    """Of a forward pass through the last block, norm and head."""
    model = _hollow(name, dtype)
    tail = Tail(model, len(blocks_of(model)) - 1)
    tokens = model.pos_embed.shape[1:]  # class token included
    weights = sum(p.numel() * p.element_size() for p in tail.parameters())
    return Cost(forward_flops(tail, (images, *tokens)), float(weights))


@functools.cache
def _hollow(name: str, dtype: torch.dtype) -> Any:
    """The model without its weights' values."""
    with torch.device("meta"):
        return timm.create_model(name).to(dtype)
