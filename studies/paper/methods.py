"""The ways to fine-tune that are compared, all from the same probe's classifier."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from studies.paper.span import Span
from tangent_ops import (
    CachedFeatures,
    LinearizedModel,
    core_basis,
    fit,
    fit_exact,
    linearize,
    statistics,
)
from tangent_ops.delta import Delta
from tangent_ops.errors import NonFiniteLossError, NotConvergedWarning
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
LORA_SCALE = 2.0  # alpha / rank
CORE, CORE_IMAGES = 8, 25  # directions on either side of a layer, and what they come from
NEWTON_TOLERANCE = 0.1


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


def head_alone(start: Start, lr: float) -> nn.Module:
    """A probe, of a start whose "tokens" are what enters the classifier."""
    head: Any = start.tail.get_submodule("head")
    return probe(start.train, head.out_features, start.loss, start.seed, lr)


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


def lora(start: Start, lr: float) -> nn.Module:
    """LoRA (Hu et al., 2022) in every linear layer of the blocks; norm and classifier whole."""
    torch.manual_seed(start.seed)
    model = LoRA(copy.deepcopy(start.tail))
    start.fit(model, lr)
    return model.eval()


class LoRA(nn.Module):
    """A tail whose blocks' linear layers have W + 2 B A for W: A as peft draws it, B of zeros.

    The sum is formed, so that the last block still runs for the class token alone, which peft's
    layers do not; the outputs are the same.
    """

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.tail = tail.requires_grad_(False)
        for trained in ("norm", "head"):
            tail.get_submodule(trained).requires_grad_(True)
        self.names = [
            f"{name}.weight"
            for name, module in tail.named_modules()
            if name.startswith("blocks.") and isinstance(module, nn.Linear)
        ]
        weights = [tail.get_parameter(name) for name in self.names]
        self.down = nn.ParameterList(w.new_empty(LOW_RANK, w.shape[1]) for w in weights)
        self.up = nn.ParameterList(w.new_zeros(len(w), LOW_RANK) for w in weights)
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=5**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        merged = {
            name: self.tail.get_parameter(name) + LORA_SCALE * up @ down
            for name, up, down in zip(self.names, self.up, self.down, strict=True)
        }
        return functional_call(self.tail, merged, (tokens,))


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


# From here on: ways that share work between rates, and so are made once for a start.


@dataclass(frozen=True)
class Fitted:
    """A model, and what else is told of how it was fitted."""

    model: nn.Module
    told: dict[str, Any] = field(default_factory=dict)


Fit = Callable[[float], Fitted]  # of a rate: a learning rate, or l2 of an exact fit


def by_steps(train: Train) -> Callable[[Start], Fit]:
    """A way that shares nothing."""
    return lambda start: lambda lr: Fitted(train(start, lr))


def momentum(start: Start) -> Fit:
    """TAFT by SGD with momentum: the steps of `fit`, taken in the span of the Jacobian's rows."""
    span, every = _span(start), torch.arange(len(start.train))
    order: dict[str, Any] = {"epochs": start.epochs, "batch": start.batch, "seed": start.seed}

    def at(lr: float) -> Fitted:
        weights = span.descend(every, LOSSES[start.loss](), lr=lr, **order)
        if not weights.isfinite().all():
            raise NonFiniteLossError(f"lr={lr:g} diverged")
        return Fitted(_moved(start.tail, span.delta(weights)))

    return at


def exact(start: Start) -> Fit:
    """TAFT's optimum for the square loss, from the tangent kernel: one solve to each l2."""
    span, every = _span(start), torch.arange(len(start.train))
    return lambda l2: Fitted(_moved(start.tail, span.delta(span.solve(every, l2))))


def newton(start: Start) -> Fit:
    """TAFT's optimum for a convex loss by Newton-CG, each l2's from that of the one before."""
    model = linearize(start.tail)
    options: dict[str, Any] = {"batch_size": 128, "representation": "factors", "progress": False}
    problem = Problem(model, start.train, 1.0, loss=LOSSES[start.loss](), **options)

    def at(l2: float) -> Fitted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # it is told
            done = fit_exact(problem.with_l2(l2), NEWTON_TOLERANCE)
        delta = model.delta_dict()
        norm = sum(float(entry.square().sum()) for entry in delta.values()) ** 0.5
        told = {"converged": done.converged, "bound": done.distance_bound / max(norm, 1e-30)}
        return Fitted(_moved(start.tail, delta), told)

    return at


def by_statistics(start: Start) -> Fit:
    """Core and classifier from sums over the samples: one solve to each l2."""
    some = CachedFeatures(start.train.features[:CORE_IMAGES], start.train.targets[:CORE_IMAGES])
    core = core_basis(start.tail, some, size=CORE)
    # The core is of some of the training images themselves: nothing is to be forgotten here.
    model = linearize(start.tail, core=core)
    sums = statistics(model, start.train, remembered=True, progress=False)
    return lambda l2: Fitted(_moved(start.tail, sums.solve(l2), core=core))


# Cells run one way after another: those of one start share its kernel, which is dear.
@functools.lru_cache(maxsize=1)
def _span(start: Start) -> Span:
    return Span(linearize(start.tail), start.train)


def _moved(tail: Tail, delta: Delta, **given: Any) -> nn.Module:
    model = linearize(tail, **given)
    model.load_delta_dict(delta)
    return model


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: What tables call it.
        family: Its best member is compared with those of the other families.
        prepare: Start -> a fit for each rate.
        grid: Rates that are tried on validation images, before it grows.
        depth: Blocks that it trains; norm and classifier come with them. 0: the classifier alone.
        steps: Whether it takes passes over the data in batches.
    """

    title: str
    family: str
    prepare: Callable[[Start], Fit]
    grid: tuple[float, ...]
    depth: int = 1
    steps: bool = True


OURS, THEIRS, SMALL, HEAD = "TAFT", "NLFT", "LoRA and adapters", "probe"
ORDINARY_GRID, TANGENT_GRID = (3e-5, 1e-4, 3e-4), (6e-5, 2e-4, 6e-4)
LORA_GRID = (6e-4, 2e-3, 6e-3)
MOMENTUM_GRID = (1e-5, 3e-5, 9e-5)  # of the rescaled square loss, whose gradients are large
L2_GRID, NEWTON_GRID = (1.0, 3.0, 9.0), (0.1, 0.3, 0.9)
METHODS = {
    "probe": Method("linear probe", HEAD, by_steps(head_alone), (3e-3, PROBE_RATE, 3e-2), depth=0),
    "nlft-1": Method("NLFT-1", THEIRS, by_steps(ordinary), ORDINARY_GRID),
    "lora-1": Method("LoRA-1", SMALL, by_steps(lora), LORA_GRID),
    "adapter-1": Method("adapter-1", SMALL, by_steps(adapters), LORA_GRID),
    "taft-1": Method("TAFT-1", OURS, by_steps(tangent), TANGENT_GRID),
    "taft-1-low-rank": Method(
        f"TAFT-1, rank {LOW_RANK}", OURS, by_steps(low_rank), (1e-3, 3e-3, 9e-3)
    ),
    "taft-1-momentum": Method("TAFT-1, SGD with momentum", OURS, momentum, MOMENTUM_GRID),
    "taft-1-exact": Method("TAFT-1, exact", OURS, exact, L2_GRID, steps=False),
    "taft-1-newton": Method("TAFT-1, exact by Newton-CG", OURS, newton, NEWTON_GRID, steps=False),
    "core": Method("core and head, statistics", OURS, by_statistics, L2_GRID, steps=False),
    "nlft-3": Method("NLFT-3", THEIRS, by_steps(ordinary), ORDINARY_GRID, depth=3),
    "taft-3": Method("TAFT-3", OURS, by_steps(tangent), (2e-5, 6e-5, 2e-4), depth=3),
    "nlft-all": Method("NLFT-all", THEIRS, by_steps(ordinary), ORDINARY_GRID, depth=12),
    "taft-all": Method("TAFT-all", OURS, by_steps(tangent), TANGENT_GRID, depth=12),
    "lora-all": Method("LoRA-all", SMALL, by_steps(lora), LORA_GRID, depth=12),
}


def trained_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    parameters = model.deltas().values() if isinstance(model, LinearizedModel) else None
    if parameters is None:
        parameters = [entry for entry in model.parameters() if entry.requires_grad]
    return sum(entry.numel() for entry in parameters)
