"""timm's vision transformers with random weights, for the benchmarks of models and epochs."""

from __future__ import annotations

import functools
import re
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Cost
from benchmarks.roofline import forward_flops, vit_cost
from tangent_ops.model.features import Tail, blocks_of

Weights = dict[str, Tensor]
EVERYTHING = ""  # a pattern of parameter names


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


def trained_parameters(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """The parameters whose names match, which require gradients from now on."""
    found = {n: p for n, p in model.named_parameters() if re.search(pattern, n)}
    for parameter in found.values():
        parameter.requires_grad_()
    return found


def torch_jvp(model: nn.Module, images: Tensor, delta: Weights) -> tuple[Tensor, Tensor]:
    """f and JΔw by PyTorch alone, whose only attention with a forward derivative is MATH."""
    weights = {name: model.get_parameter(name) for name in delta}

    def run(weights: Weights) -> Tensor:
        return functional_call(model, weights, images)

    with sdpa_kernel(SDPBackend.MATH):
        f, tangent, *_ = torch.func.jvp(run, (weights,), (delta,))
    return f, tangent


def model_cost(question: str, name: str, dtype: torch.dtype, images: int, part: str) -> Cost:
    """The least work of a pass or a step of a timm model.

    Args:
        question: as in ``roofline.vit_cost``.
        name: of the model.
        dtype: of its weights.
        images: of one call.
        part: what is trained: "all"; "last": block, norm and head, where the trunk below runs
            forward alone; "tail": the same without the trunk.
    """
    asked = _whole(question, name, dtype, images)
    if part == "all":
        return asked
    whole, tail = _whole("primal", name, dtype, images), _tail(name, dtype, images)
    trunk = float(part == "last")
    return Cost(
        asked.flops * tail.flops / whole.flops + trunk * (whole.flops - tail.flops),
        asked.bytes * tail.bytes / whole.bytes + trunk * (whole.bytes - tail.bytes),
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
