"""A private training step beside an ordinary one and Opacus' private steps of the same block.

pytest benchmarks/bench_private.py --benchmark-only
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from tangent_ops import LinearizedModel, last_blocks, linearize
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import split_model

opacus = pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus' own

MODEL, BATCH = "vit_small_patch16_224", 8
NOISE, CLIP, LR = 1.0, 1.0, 1e-4
LOSS = RescaledSquareLoss()
Step = Callable[[], object]


class Batch(NamedTuple):
    """Tokens (batch, 197, 384) that enter the last block, and classes (batch,)."""

    tokens: Tensor
    targets: Tensor


def ordinary(tail: LinearizedModel, batch: Batch) -> Step:
    optimizer = torch.optim.AdamW(tail.deltas().values(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        LOSS(tail(batch.tokens), batch.targets).backward()
        optimizer.step()

    return step


def private(tail: LinearizedModel, batch: Batch, mode: str, secure: bool = False) -> Step:
    """A step of `fit_private`."""
    from tangent_ops.privacy.noise import NoiseSource
    from tangent_ops.privacy.optimizer import PrivateOptimizer
    from tangent_ops.privacy.per_sample.gradients import PerSampleGradients

    gradients, deltas = PerSampleGradients(tail, batch.tokens), tail.deltas()
    optimizer = PrivateOptimizer(
        torch.optim.AdamW(deltas.values(), lr=LR),
        NoiseSource(None if secure else 0, secure),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=BATCH,
        l2=0.0,
        group=False,
    )

    def step() -> None:
        found = gradients.clipped_sum(batch.tokens, batch.targets, LOSS, CLIP, mode)
        optimizer.take({deltas[name]: value for name, value in found.items()})

    return step


def opacus_step(tail: nn.Module, batch: Batch, ghost: bool) -> Step:
    """Opacus on the same parameters of the ordinary model: one forward pass, not three."""
    from opacus import grad_sample, optimizers
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = copy.deepcopy(tail).requires_grad_(True).train()
    inner = torch.optim.AdamW(model.parameters(), lr=LR)
    options: dict[str, Any] = {"noise_multiplier": NOISE, "max_grad_norm": CLIP}
    options["expected_batch_size"] = BATCH
    loss: Any = LOSS
    if ghost:
        module: Any = grad_sample.GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP)  # pyright: ignore[reportArgumentType]
        optimizer: Any = optimizers.DPOptimizerFastGradientClipping(inner, **options)
        loss = DPLossFastGradientClipping(module, optimizer, LOSS, "mean")
    else:
        module, optimizer = (
            grad_sample.GradSampleModule(model),
            optimizers.DPOptimizer(inner, **options),
        )

    def step() -> None:
        optimizer.zero_grad()
        loss(module(batch.tokens), batch.targets).backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[[LinearizedModel, nn.Module, Batch], Step]] = {
    "not private": lambda tail, plain, batch: ordinary(tail, batch),
    "bookkeeping": lambda tail, plain, batch: private(tail, batch, "bookkeeping"),
    "ghost": lambda tail, plain, batch: private(tail, batch, "ghost"),
    "per-sample": lambda tail, plain, batch: private(tail, batch, "per-sample"),
    "secure noise": lambda tail, plain, batch: private(tail, batch, "bookkeeping", secure=True),
    "Opacus per-sample": lambda tail, plain, batch: opacus_step(plain, batch, ghost=False),
    "Opacus ghost": lambda tail, plain, batch: opacus_step(plain, batch, ghost=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark, name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL).eval().requires_grad_(False)
    tail = linearize(model, last_blocks(model, 1), check=False).split()[1]
    plain = split_model(model, len(model.blocks) - 1)[1]
    tokens = torch.randn(BATCH, *model.pos_embed.shape[1:])
    batch = Batch(tokens, torch.randint(model.num_classes, (BATCH,)))
    benchmark.group = f"step of {MODEL}'s last block, norm and head, batch {BATCH}, CPU"
    benchmark.pedantic(STEPS[name](tail, plain, batch), rounds=3, warmup_rounds=1)
