"""The sides of a comparison, our linearized model and its rivals, each as a step to call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops.errors import ZeroHeadWarning
from tangent_ops.model.linearize import last_blocks, linearize
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops import forward_ad

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "train")
OURS = "tangent-ops"
MEANING = {
    OURS: "tangent_ops.linearize: value and tangent by all trained parameters",
    "torch-jvp": "torch.func.jvp of the same function under PyTorch's MATH attention",
    "finetune": "the ordinary model, without a tangent",
}
RIVALS = tuple(name for name in MEANING if name != OURS)

CLASSES = 1000
_SEED = 0
_SCALE = 1e-2  # of the deltas; zeros can be faster to compute with


@dataclass(frozen=True)
class Settings:
    """What to profile.

    Attributes:
        model: name of a timm model; its weights are random, its classes :data:`CLASSES`.
        batch: images in a step.
        dtype: a key of :data:`DTYPES`, of weights, deltas and images.
        mode: one of :data:`MODES`: a forward pass under ``no_grad``; or one with cross-entropy,
            backward and zero_grad.
        device: "cpu", "cuda" or "cuda:N".
        against: some of :data:`RIVALS`.
        out: folder for the traces and reports.
        steps: number of steps that are timed, and as many that are profiled.
        warmup: steps before those.
        blocks: how many last blocks are trained (:func:`tangent_ops.last_blocks`); None: all
            parameters.
    """

    model: str
    batch: int
    dtype: str
    mode: str
    device: str
    against: tuple[str, ...]
    out: Path
    steps: int = 5
    warmup: int = 2
    blocks: int | None = None


def build(name: str, settings: Settings) -> Callable[[], Any]:
    """A step of a side, as a function; all sides have the same weights, deltas, images and labels.

    Args:
        name: :data:`OURS` or one of :data:`RIVALS`.
        settings: what to run.
    """
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    torch.manual_seed(_SEED)
    model = create(settings.model).to(device, dtype).requires_grad_(False)
    shape = (settings.batch, *input_size(model))
    images = torch.randn(shape, generator=_generator()).to(device, dtype)
    labels = torch.randint(CLASSES, (settings.batch,), generator=_generator()).to(device)
    tangent = _linearized(model, settings.blocks)

    if name == OURS:
        run, trained = (lambda: tangent(images)), list(tangent.deltas().values())
    elif name == "torch-jvp":
        deltas = {n: delta.detach().requires_grad_() for n, delta in tangent.deltas().items()}
        run, trained = functools.partial(_torch_jvp, model, deltas, images), list(deltas.values())
    else:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in tangent.deltas())
        run, trained = (lambda: model(images)), list(model.parameters())
    if settings.mode == "forward":
        return torch.no_grad()(run)
    return functools.partial(_train, run, trained, labels)


def create(name: str) -> Any:
    """A timm model in eval mode, with random weights and :data:`CLASSES` classes."""
    return timm.create_model(name, num_classes=CLASSES).eval()


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of a timm model's images."""
    return tuple(model.pretrained_cfg["input_size"])


@contextmanager
def attention_marked() -> Iterator[None]:
    """Name our attention in the profile, because its masked eager path is plain operations."""
    original = forward_ad.scaled_dot_product_attention

    @functools.wraps(original)
    def marked(*args, **kwargs):
        with record_function("tangent_ops.scaled_dot_product_attention"):
            return original(*args, **kwargs)

    forward_ad.scaled_dot_product_attention = marked
    try:
        yield
    finally:
        forward_ad.scaled_dot_product_attention = original


def _linearized(model: nn.Module, blocks: int | None) -> LinearizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroHeadWarning)  # nothing is learned here
        tangent = linearize(model, None if blocks is None else last_blocks(model, blocks))
    noise = _generator()
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.copy_(_SCALE * torch.randn(delta.shape, generator=noise))
    return tangent


def _torch_jvp(model: nn.Module, deltas: dict[str, Tensor], images: Tensor) -> Tensor:
    weights = {name: model.get_parameter(name).detach() for name in deltas}
    directions = {name: delta.to(weights[name].dtype) for name, delta in deltas.items()}
    with sdpa_kernel(SDPBackend.MATH):  # other backends have no forward derivative
        output, output_t, *_ = torch.func.jvp(
            lambda w: functional_call(model, w, (images,)), (weights,), (directions,)
        )
    return output + output_t


def _train(run: Callable[[], Tensor], trained: Sequence[Tensor], labels: Tensor) -> None:
    F.cross_entropy(run(), labels).backward()
    for parameter in trained:
        parameter.grad = None  # as zero_grad does


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
