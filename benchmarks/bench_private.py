"""A private training step beside an ordinary one and Opacus' private steps of the same block.

pytest benchmarks/bench_private.py --benchmark-only
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tangent_ops import LinearizedModel, last_blocks, linearize
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import split_model

pytest.importorskip("opacus", reason="the extra for privacy is not installed")

from opacus.grad_sample.utils import wrap_model
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.optimizer import PrivateOptimizer
from tangent_ops.privacy.per_sample.gradients import PerSampleGradients

pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus' own

MODEL, BATCH, CLIP, LR = "vit_small_patch16_224", 8, 1.0, 1e-4
OPTIONS: Any = {"noise_multiplier": 1.0, "max_grad_norm": CLIP, "expected_batch_size": BATCH}
LOSS: Any = RescaledSquareLoss()
Step = Callable[[], object]
Batch = tuple[
    Tensor, Tensor
]  # tokens (batch, 197, 384) that enter the last block; classes (batch,)


def step_of(model: nn.Module, optimizer: Any, batch: Batch, loss: Any = LOSS) -> Step:
    tokens, targets = batch

    def step() -> None:
        optimizer.zero_grad()
        loss(model(tokens), targets).backward()
        optimizer.step()

    return step


def ordinary(tail: LinearizedModel, _: nn.Module, batch: Batch) -> Step:
    return step_of(tail, torch.optim.AdamW(tail.deltas().values(), lr=LR), batch)


def private(
    tail: LinearizedModel, _: nn.Module, batch: Batch, mode: str, secure: bool = False
) -> Step:
    """A step of `fit_private`."""
    gradients, deltas = PerSampleGradients(tail, batch[0]), tail.deltas()
    noise = NoiseSource(None if secure else 0, secure)
    inner = torch.optim.AdamW(deltas.values(), lr=LR)
    optimizer = PrivateOptimizer(inner, noise, l2=0.0, group=False, **OPTIONS)

    def step() -> None:
        found = gradients.clipped_sum(*batch, LOSS, CLIP, mode)
        optimizer.take({deltas[name]: value for name, value in found.items()})

    return step


def opacus(_: LinearizedModel, plain: nn.Module, batch: Batch, mode: str) -> Step:
    """Opacus on the same parameters of the ordinary model: one forward pass, not three."""
    ghost: Any = {"max_grad_norm": CLIP} if mode == "ghost" else {}
    model = copy.deepcopy(plain).requires_grad_(True).train()
    module: Any = wrap_model(model, grad_sample_mode=mode, **ghost)
    kind: Any = get_optimizer_class("flat", distributed=False, grad_sample_mode=mode)
    optimizer = kind(torch.optim.AdamW(model.parameters(), lr=LR), **OPTIONS)
    loss = DPLossFastGradientClipping(module, optimizer, LOSS, "mean") if ghost else LOSS
    return step_of(module, optimizer, batch, loss)


STEPS: dict[str, Callable[..., Step]] = {
    "not private": ordinary,
    "bookkeeping": partial(private, mode="bookkeeping"),
    "ghost": partial(private, mode="ghost"),
    "per-sample": partial(private, mode="per-sample"),
    "secure noise": partial(private, mode="bookkeeping", secure=True),
    "Opacus per-sample": partial(opacus, mode="hooks"),
    "Opacus ghost": partial(opacus, mode="ghost"),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark, name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL).eval().requires_grad_(False)
    tail = linearize(model, last_blocks(model, 1), check=False).split()[1]
    plain = split_model(model, len(model.blocks) - 1)[1]
    tokens = torch.randn(BATCH, *model.pos_embed.shape[1:])
    batch = tokens, torch.randint(model.num_classes, (BATCH,))
    benchmark.group = f"step of {MODEL}'s last block, norm and head, batch {BATCH}, CPU"
    benchmark.pedantic(STEPS[name](tail, plain, batch), rounds=3, warmup_rounds=1)
