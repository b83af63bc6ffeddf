"""One epoch of training by ``tangent_ops.fit``, optimizer included, on images in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.suite.case import Call, Case, Cost, Extent, Outputs, Provider
from benchmarks.suite.vits import cost, random_batch, random_vit, torch_jvp
from tangent_ops import cache_features, fit, last_blocks, linearize

EPOCH = "epoch"
LR = 1e-3
EVERYTHING = ""  # a pattern of parameter names


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


class EpochWorkload:
    """Ops are names of timm models, shapes (images, batch), at the model's own size of images.

    Every call is an epoch of AdamW from the same start: Δw = 0, or w0. "taft-1-cached" finds the
    trunk's features ready, as every epoch but the first does; "taft-1-cached-first" computes them.
    In "bf16" weights and deltas are float32 and products autocast, as `fit` does by default where
    a GPU can.

    Results are TAFT-1's: the epoch's mean loss, on which all deltas tell from the second step on,
    and in float32 the final norm's delta; in other deltas AdamW, which divides by the gradient's
    size, magnifies the rounding errors of small gradients. Whoever trains something else gives
    none, and is not checked: "train-step" has checked its gradients.
    """

    groups = (EPOCH,)

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        if device.type == "cpu":
            sizes, dtype = [("vit_tiny_patch16_224", (8, 4))], "fp32"
            more = [("vit_small_patch16_224", (64, 8)), ("vit_base_patch16_224", (16, 8))]
        else:
            sizes, dtype = [("vit_base_patch16_224", (1024, 64))], "bf16"
            more = [("vit_large_patch16_224", (1024, 64))]
        found = sizes + more if extent == "full" else sizes
        return [Case(EPOCH, name, shape, dtype) for name, shape in found]

    def providers(self, case: Case) -> Sequence[Provider]:
        """TAFT-1 with and without a cache, ordinary fine-tuning, everything linearized."""
        last, tail = {"last_block": True}, {"last_block": True, "trunk": False}
        tangent, plain = "tangent-step", "ordinary-step"
        return [
            Provider("taft-1-cached", _prepare(taft_cached), partial(_cost, tangent, **tail)),
            Provider(
                "taft-1-cached-first",
                _prepare(partial(taft, blocks=1, cache=True)),
                partial(_cost, tangent, **last),
            ),
            Provider("taft-1", _prepare(partial(taft, blocks=1)), partial(_cost, tangent, **last)),
            Provider("finetune", _prepare(finetune), partial(_cost, plain)),
            Provider(
                "finetune-1", _prepare(partial(finetune, blocks=1)), partial(_cost, plain, **last)
            ),
            Provider("taft-all", _prepare(taft), partial(_cost, tangent)),
        ]

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
        pattern = last_blocks(model, 1)
        deltas = {
            name: torch.zeros_like(parameter).requires_grad_()
            for name, parameter in model.named_parameters()
            if re.search(pattern, name)
        }
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

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """All of it."""
        return outputs

    def bound(self, case: Case) -> float:
        """Errors are 3e-6, of the delta, and 5e-5, of the loss. A J 1 % off errs 1e-4 or more."""
        return {"fp32": 2e-5, "bf16": 1e-3}[case.dtype]


# --- who trains what ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What an epoch trains, and on what.

    Attributes:
        model: what `fit` gets.
        data: likewise.
        trained: the parameters that it changes, by the anchor's names.
        start: their values at the start.
        cache: `fit`'s.
        compared: whether the results are TAFT-1's.
    """

    model: nn.Module
    data: DataLoader[Any]
    trained: dict[str, nn.Parameter]
    start: dict[str, Tensor]
    cache: bool = False
    compared: bool = False


def taft(operands: Operands, blocks: int | None = None, cache: bool = False) -> Training:
    pattern = EVERYTHING if blocks is None else last_blocks(operands.model, blocks)
    tangent = linearize(operands.model, pattern, check=False)
    start = {**tangent.delta_dict()}
    return Training(
        tangent, operands.loader(), tangent.deltas(), start, cache, compared=blocks is not None
    )


def taft_cached(operands: Operands) -> Training:
    """TAFT-1 on features computed before."""
    tangent = linearize(operands.model, last_blocks(operands.model, 1), check=False)
    trunk, tail = tangent.split()
    device = next(tail.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=operands.amp):
        features = cache_features(trunk, operands.loader(), progress=False)
    data = DataLoader(features, operands.batch)
    return Training(tail, data, tail.deltas(), {**tangent.delta_dict()}, compared=True)


def finetune(operands: Operands, blocks: int | None = None) -> Training:
    """The ordinary model, or its last blocks alone; the rest is frozen."""
    pattern = EVERYTHING if blocks is None else last_blocks(operands.model, blocks)
    model = copy.deepcopy(operands.model)
    trained = {n: p for n, p in model.named_parameters() if re.search(pattern, n)}
    start = {name: parameter.clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.requires_grad_()
    return Training(model, operands.loader(), trained, start)


def _prepare(make: Callable[[Operands], Training]) -> Callable[[Case, Operands], Call]:
    def prepare(case: Case, operands: Operands) -> Call:
        training = make(operands)

        def epoch() -> Outputs:
            with torch.no_grad():
                for name, parameter in training.trained.items():
                    parameter.copy_(training.start[name])
            history = fit(
                training.model,
                training.data,
                loss=F.cross_entropy,
                epochs=1,
                lr=LR,
                schedule="constant",
                amp=operands.amp,
                cache=training.cache,
                progress=False,
            )
            if not training.compared:
                return ()
            return _results(case.dtype, history.loss[0], training.trained)

        return epoch

    return prepare


def _results(dtype: str, loss: float, deltas: dict[str, Any]) -> Outputs:
    delta = deltas["norm.weight"].detach().clone()
    mean = torch.tensor(loss, dtype=torch.float64, device=delta.device)
    return (mean, delta) if dtype == "fp32" else (mean,)


def _cost(question: str, case: Case, **part: bool) -> Cost:
    """Of all steps; the optimizer's own work is left out."""
    images, batch = case.shape
    step = cost(question, case.op, torch.float32, batch, **part)
    steps = -(-images // batch)
    return Cost(steps * step.flops, steps * step.bytes)
