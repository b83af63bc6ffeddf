"""The ways to fine-tune that are compared, all from the same probe's classifier."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tangent_ops import CachedFeatures, LinearizedModel, fit, fit_exact, linearize
from tangent_ops.errors import NotConvergedWarning
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import Tail

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "square": RescaledSquareLoss,
    "cross-entropy": nn.CrossEntropyLoss,
}
PROBE_EPOCHS = 30
PROBE_RATE = 1e-2
LOW_RANK = 8  # of low-rank deltas and of LoRA's
BOTTLENECK = 64  # of adapters
EXACT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Start:
    """What every way starts from.

    Attributes:
        tail: From tokens to logits, with a probe as its classifier; not to be changed.
        train: Tokens and classes to train on.
        loss: In `LOSSES`.
        seed: Of the order of the samples and of what is drawn for new weights.
        epochs: Passes over the data.
        batch: Samples of a step.
    """

    tail: Tail
    train: CachedFeatures
    loss: str
    seed: int
    epochs: int
    batch: int = 32

    def fit(self, model: nn.Module, lr: float) -> None:
        """Train what requires a gradient."""
        given: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch, "lr": lr}
        fit(model, self.train, loss=LOSSES[self.loss](), seed=self.seed, progress=False, **given)


@dataclass(frozen=True)
class Trained:
    """A model that was trained, how many numbers that changed, and how long it took."""

    model: nn.Module
    parameters: int
    seconds: float


Train = Callable[[Start, float], nn.Module]


def probe(
    features: CachedFeatures, classes: int, loss: str, seed: int, lr: float = PROBE_RATE
) -> nn.Linear:
    """A linear classifier of the frozen features, from zeros."""
    head = nn.Linear(features.features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    options: dict[str, Any] = {"epochs": PROBE_EPOCHS, "batch_size": 32, "lr": lr}
    fit(head, features, loss=LOSSES[loss](), seed=seed, progress=False, **options)
    return head


def with_head(tail: Tail, head: nn.Linear) -> Tail:
    """A copy of the tail with that classifier."""
    copied = copy.deepcopy(tail)
    copied.get_submodule("head").load_state_dict(head.state_dict())
    return copied.eval()


def ordinary(start: Start, lr: float) -> nn.Module:
    """Ordinary, non-linear fine-tuning (the paper's NLFT)."""
    model = copy.deepcopy(start.tail).requires_grad_(True)
    start.fit(model, lr)
    return model


def tangent(start: Start, lr: float) -> nn.Module:
    """Tangent fine-tuning (TAFT)."""
    model = linearize(start.tail)
    start.fit(model, lr)
    return model


def low_rank(start: Start, lr: float) -> nn.Module:
    """Tangent fine-tuning in low-rank deltas."""
    model = linearize(start.tail, rank=LOW_RANK, basis=0)
    start.fit(model, lr)
    return model


def exact(start: Start, l2: float) -> nn.Module:
    """The minimum of the tangent model's loss, by conjugate gradients."""
    model = linearize(start.tail)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        fit_exact(Problem(model, start.train, l2, batch_size=128, progress=False), EXACT_TOLERANCE)
    return model


def lora(start: Start, lr: float) -> nn.Module:
    """LoRA (Hu et al., 2022) by peft, in every linear layer; norm and classifier whole."""
    from peft import LoraConfig, get_peft_model  # slow to import

    torch.manual_seed(start.seed)
    model = copy.deepcopy(start.tail)
    layers = [
        name
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]
    config = LoraConfig(r=LOW_RANK, lora_alpha=2 * LOW_RANK, target_modules=layers)
    adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    for trained in ("norm", "head"):
        model.get_submodule(trained).requires_grad_(True)
    wrapped = _FirstArgument(adapted)
    start.fit(wrapped, lr)
    return wrapped.eval()


def adapters(start: Start, lr: float) -> nn.Module:
    """Bottlenecks after every MLP (Houlsby et al., 2019); norm and classifier whole."""
    torch.manual_seed(start.seed)
    model = copy.deepcopy(start.tail).requires_grad_(False)
    head: Any = model.get_submodule("head")
    for block in model.blocks.values():
        block.mlp = nn.Sequential(block.mlp, _Adapter(head.in_features))  # type: ignore
    for trained in (model.norm, head):
        trained.requires_grad_(True)
    start.fit(model, lr)
    return model


class _Adapter(nn.Module):
    """x + up(gelu(down(x))); the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


class _FirstArgument(nn.Module):
    """peft's models take anything by name, too; the rest of the house passes one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: What tables call it.
        train: Start and rate -> model; the rate is l2 for an exact fit.
        rates: What is tried on validation images.
        depth: Blocks that it trains; norm and classifier come with them.
        losses: That it can be run with.
    """

    title: str
    train: Train
    rates: tuple[float, ...]
    depth: int = 1
    losses: tuple[str, ...] = ("square", "cross-entropy")


METHODS = {
    "nlft-1": Method("NLFT-1", ordinary, (3e-5, 1e-4, 3e-4)),
    "taft-1": Method("TAFT-1", tangent, (5e-5, 2e-4, 6e-4)),
    "lora-1": Method("LoRA-1", lora, (5e-4, 2e-3)),
    "adapter-1": Method("adapter-1", adapters, (5e-4, 2e-3)),
    "taft-1-low-rank": Method(f"TAFT-1, rank {LOW_RANK}", low_rank, (1e-3, 3e-3)),
    "taft-1-exact": Method("TAFT-1, exact", exact, (3.0, 10.0), losses=("square",)),
    "nlft-3": Method("NLFT-3", ordinary, (3e-5, 1e-4), depth=3),
    "taft-3": Method("TAFT-3", tangent, (5e-5, 2e-4), depth=3),
    "nlft-all": Method("NLFT-all", ordinary, (3e-5, 1e-4), depth=12),
    "taft-all": Method("TAFT-all", tangent, (1e-4, 3e-4), depth=12),
    "lora-all": Method("LoRA-all", lora, (5e-4, 2e-3), depth=12),
}


def train(method: Method, start: Start, rate: float) -> Trained:
    """Run a way, and time it."""
    began = time.perf_counter()
    model = method.train(start, rate)
    seconds = time.perf_counter() - began
    return Trained(model, trained_parameters(model), seconds)


def trained_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    parameters = model.deltas().values() if isinstance(model, LinearizedModel) else None
    if parameters is None:
        parameters = [entry for entry in model.parameters() if entry.requires_grad]
    return sum(entry.numel() for entry in parameters)
