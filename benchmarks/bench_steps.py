"""An epoch of training by ``tangent_ops.fit``, optimizer included, on images in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.case import Call, Case, Cost, Extent, Outputs, Provider, Suite
from benchmarks.vits import (
    EVERYTHING,
    model_cost,
    random_batch,
    random_vit,
    torch_jvp,
    trained_parameters,
)
from tangent_ops import cache_features, fit, last_blocks, linearize

LR = 1e-3


@dataclass(frozen=True)
class Operands:
    """A model at w0, and a data set in the order it is read.

    Attributes:
        model: in eval mode, frozen, all its parameters random; float32.
        images: (images, 3, H, W), float32, on the CPU.
        targets: (images,), class indices, on the CPU.
        batch: images of a step.
        amp: whether products run in bfloat16.
    """

    model: nn.Module
    images: Tensor
    targets: Tensor
    batch: int
    amp: bool

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.targets), self.batch)


@dataclass(frozen=True)
class Training:
    """What an epoch trains, and on what.

    Attributes:
        model: the one that `fit` trains.
        data: its data.
        trained: the parameters that it changes, by the anchor's names.
        cache: `fit`'s argument.
        compared: whether the results are TAFT-1's.
    """

    model: nn.Module
    data: DataLoader[Any]
    trained: dict[str, nn.Parameter]
    cache: bool = False
    compared: bool = False


class EpochSuite(Suite):
    """Ops are names of timm models, shapes (images, batch), at the model's own size of images.

    A provider's function takes Operands and gives a Training. Every call is an epoch of AdamW from
    the same start: Δw = 0, or w0. In "bf16" weights and deltas are float32 and products autocast,
    as `fit` does by default where a GPU can.

    Results are TAFT-1's: the epoch's mean loss, on which all deltas tell from the second step on,
    and in float32 the final norm's delta. AdamW divides by the gradient's size, which magnifies the
    rounding errors of small gradients in other deltas. A provider that trains something else gives
    none, and is not checked: "train-step" has checked its gradients.
    """

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        if device.type == "cpu":
            sizes, dtype = [("vit_tiny_patch16_224", (8, 4))], "fp32"
            more = [("vit_small_patch16_224", (64, 8)), ("vit_base_patch16_224", (16, 8))]
        else:
            sizes, dtype = [("vit_base_patch16_224", (1024, 64))], "bf16"
            more = [("vit_large_patch16_224", (1024, 64))]
        found = sizes + more if extent == "full" else sizes
        return [Case("epoch", name, shape, dtype) for name, shape in found]

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        images, batch = case.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = random_vit(case.op)
            data = random_batch(model, images)
        return Operands(model.to(device), *data, batch, case.dtype == "bf16")

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """Of a loop of its own in float64: torch.func.jvp, torch's AdamW."""
        model = copy.deepcopy(inputs.model).double()
        device = next(model.parameters()).device
        trained = trained_parameters(model, last_blocks(model, 1))
        deltas = {name: torch.zeros_like(p).requires_grad_() for name, p in trained.items()}
        model.requires_grad_(False)
        optimizer = torch.optim.AdamW(deltas.values(), lr=LR, weight_decay=0.0)
        losses = []
        for images, targets in inputs.loader():
            f, tangent = torch_jvp(model, images.to(device).double(), deltas)
            loss = F.cross_entropy(f + tangent, targets.to(device), reduction="none")
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
        return _results(case.dtype, float(torch.cat(losses).mean()), deltas)

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        training = provider.answer(inputs)
        start = {name: parameter.detach().clone() for name, parameter in training.trained.items()}

        def epoch() -> Outputs:
            with torch.no_grad():
                for name, parameter in training.trained.items():
                    parameter.copy_(start[name])
            history = fit(
                training.model,
                training.data,
                loss=F.cross_entropy,
                epochs=1,
                lr=LR,
                schedule="constant",
                amp=inputs.amp,
                cache=training.cache,
                progress=False,
            )
            if not training.compared:
                return ()
            return _results(case.dtype, history.loss[0], training.trained)

        return epoch

    def bound(self, case: Case) -> float:
        """Errors are 3e-6, of the delta, and 5e-5, of the loss. A J 1 % off errs 1e-4 or more."""
        return {"fp32": 2e-5, "bf16": 1e-3}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        """Of all steps; the optimizer's own work is left out."""
        images, batch = case.shape
        question = {"tangent": "tangent-step", "primal": "ordinary-step"}[provider.question]
        step = model_cost(question, case.op, torch.float32, batch, provider.part)
        steps = -(-images // batch)
        return Cost(steps * step.flops, steps * step.bytes)


def _results(dtype: str, loss: float, deltas: dict[str, Any]) -> Outputs:
    delta = deltas["norm.weight"].detach().clone()
    mean = torch.tensor(loss, dtype=torch.float64, device=delta.device)
    return (mean, delta) if dtype == "fp32" else (mean,)


# --- providers -----------------------------------------------------------------------------------

SUITE = EpochSuite()


@SUITE.provider("taft-1-cached", part="tail")
def taft_1_cached(operands: Operands) -> Training:
    """On features computed before: every epoch but the first."""
    tangent = linearize(operands.model, last_blocks(operands.model, 1), check=False)
    trunk, tail = tangent.split()
    device = next(tail.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=operands.amp):
        features = cache_features(trunk, operands.loader(), progress=False)
    return Training(tail, DataLoader(features, operands.batch), tail.deltas(), compared=True)


def taft(operands: Operands, pattern: str, cache: bool = False) -> Training:
    tangent = linearize(operands.model, pattern, check=False)
    compared = pattern != EVERYTHING
    return Training(tangent, operands.loader(), tangent.deltas(), cache, compared)


@SUITE.provider("taft-1-cached-first", part="last")
def taft_1_cached_first(operands: Operands) -> Training:
    """The first epoch, which computes the features."""
    return taft(operands, last_blocks(operands.model, 1), cache=True)


@SUITE.provider("taft-1", part="last")
def taft_1(operands: Operands) -> Training:
    return taft(operands, last_blocks(operands.model, 1))


@SUITE.provider("taft-all")
def taft_all(operands: Operands) -> Training:
    return taft(operands, EVERYTHING)


def ordinary(operands: Operands, pattern: str) -> Training:
    model = copy.deepcopy(operands.model)
    return Training(model, operands.loader(), trained_parameters(model, pattern))


@SUITE.provider("finetune", question="primal")
def finetune(operands: Operands) -> Training:
    return ordinary(operands, EVERYTHING)


@SUITE.provider("finetune-1", question="primal", part="last")
def finetune_1(operands: Operands) -> Training:
    return ordinary(operands, last_blocks(operands.model, 1))


# --- benchmarks ----------------------------------------------------------------------------------


def test_epoch(provider, benchmark) -> None:
    provider.time(benchmark)
