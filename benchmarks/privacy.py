"""What a private step costs beside an ordinary one: time and memory, ours and Opacus'.

python -m benchmarks.privacy --out benchmarks/results/privacy/cpu.json
python -m benchmarks.publish            # writes the table in docs/promises/privacy.md
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.privacy_table import Step, speed_table
from benchmarks.record import environment, write_json
from benchmarks.suite.vits import random_vit
from benchmarks.timing import interleave
from tangent_ops import LinearizedModel, last_blocks, linearize
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import split_model
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.optimizer import PrivateOptimizer
from tangent_ops.privacy.per_sample.gradients import MODES, PerSampleGradients
from tangent_ops.profiling.memory import peak_bytes

MODEL = "vit_small_patch16_224"
NOISE, CLIP, LR = 1.0, 1.0, 1e-4
Call = Callable[[], object]


@dataclass(frozen=True)
class Batch:
    """What enters the last block, and the classes."""

    tokens: Tensor
    targets: Tensor


def taft(tail: LinearizedModel, batch: Batch) -> Call:
    """The ordinary step: no privacy."""
    loss, optimizer = RescaledSquareLoss(), torch.optim.AdamW(tail.deltas().values(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        loss(tail(batch.tokens), batch.targets).backward()
        optimizer.step()

    return step


def private(tail: LinearizedModel, batch: Batch, mode: str, secure: bool = False) -> Call:
    """What `fit_private` does in a step."""
    gradients, deltas = PerSampleGradients(tail, batch.tokens), tail.deltas()
    optimizer = PrivateOptimizer(
        torch.optim.AdamW(deltas.values(), lr=LR),
        NoiseSource(None if secure else 0, secure),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=len(batch.targets),
        l2=0.0,
        group=False,
    )
    loss = RescaledSquareLoss()

    def step() -> None:
        found = gradients.clipped_sum(batch.tokens, batch.targets, loss, CLIP, mode)
        optimizer.take({deltas[name]: value for name, value in found.items()})

    return step


def opacus(tail: nn.Module, batch: Batch, ghost: bool) -> Call:
    """Opacus on the ordinary model's same parameters; its backward pass is of one forward pass."""
    model = copy.deepcopy(tail).requires_grad_(True).train()
    stepper = torch.optim.AdamW(model.parameters(), lr=LR)
    count = len(batch.targets)
    options: dict[str, Any] = {"noise_multiplier": NOISE, "max_grad_norm": CLIP}
    optimizer: Any
    if ghost:
        module: Any = GradSampleModuleFastGradientClipping(
            model,
            max_grad_norm=CLIP,  # pyright: ignore[reportArgumentType]
        )
        optimizer = DPOptimizerFastGradientClipping(stepper, expected_batch_size=count, **options)
        loss: Any = DPLossFastGradientClipping(module, optimizer, RescaledSquareLoss(), "mean")
    else:
        module, loss = GradSampleModule(model), RescaledSquareLoss()
        optimizer = DPOptimizer(stepper, expected_batch_size=count, **options)

    def step() -> None:
        optimizer.zero_grad()
        loss(module(batch.tokens), batch.targets).backward()
        optimizer.step()

    return step


def steps(name: str, count: int) -> dict[str, Call]:
    """Every step on a batch of tokens that are there already; each on a model of its own."""
    torch.manual_seed(0)
    model = random_vit(name)
    tokens, classes = model.get_parameter("pos_embed").shape[1:], model.get_parameter("head.bias")
    batch = Batch(torch.randn(count, *tokens), torch.randint(len(classes), (count,)))

    def tail() -> LinearizedModel:
        own = linearize(model, last_blocks(model, 1), check=False).split()[1]
        for delta in own.deltas().values():
            delta.data.normal_(std=1e-3)
        return own

    ordinary = split_model(model, len(model.blocks) - 1)[1]  # pyright: ignore
    calls = {"taft": taft(tail(), batch)}
    calls |= {mode: private(tail(), batch, mode) for mode in MODES}
    calls["bookkeeping, secure noise"] = private(tail(), batch, "bookkeeping", secure=True)
    calls["Opacus, per-sample"] = opacus(ordinary, batch, ghost=False)
    try:
        ghost = opacus(ordinary, batch, ghost=True)
        ghost()
        calls["Opacus, ghost"] = ghost
    except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        print(f"Opacus' ghost mode does not run here: {error}", file=sys.stderr)
    return calls


def measure(name: str, count: int, budget: float) -> list[Step]:
    calls = steps(name, count)
    seconds = interleave(
        {key: [call] for key, call in calls.items()}, device=torch.device("cpu"), budget=budget
    )
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    return [Step(key, medians[key], peak_bytes(call, "cpu")) for key, call in calls.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/privacy.json"), metavar="FILE")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="per batch size")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Opacus', torch.jit's
    rows = {
        str(count): [asdict(row) for row in measure(MODEL, count, options.seconds)]
        for count in options.batch
    }
    setting = (
        f"{MODEL}, random weights, last block, norm and head trained, on tokens that are there"
    )
    content = {"environment": environment(), "setting": setting, "rows": rows}
    write_json(options.out, content)
    print(speed_table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
