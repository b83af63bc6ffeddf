"""Whole vision transformers: forward with tangent, and a training step.

All providers of a case are asked the same: f and JΔw for a Δw of *all* parameters; or, in a step,
gradients of the cross-entropy at f + JΔw. One that computes only a part of JΔw, as TAFT-1 does, is
*given* the rest, a constant of (images, classes), and adds it. A step of ordinary fine-tuning is
given all of it: since the backward pass of TAFT is the anchor's own, its gradients are TAFT's, and
are checked with theirs.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.suite.case import Call, Case, Cost, Extent, Outputs, Provider
from benchmarks.suite.derivatives import (
    compiling_is_too_slow,
    finite_difference_slack,
    finite_difference_step,
)
from benchmarks.suite.vits import (
    Weights,
    cost,
    random_batch,
    random_vit,
    representatives,
    torch_jvp,
)
from tangent_ops import last_blocks, linearize

FORWARD, STEP = "model-forward", "train-step"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
EVERYTHING = ""  # patterns of parameter names
NOTHING = "$^"


@dataclass
class Operands:
    """A model at w0, a Δw, and a batch.

    Attributes:
        model: in eval mode, frozen, all its parameters random.
        delta: Δw of all parameters by name, normal with standard deviation 1e-2.
        images: (B, 3, H, W).
        targets: (B,), class indices.
    """

    model: Any
    delta: Weights
    images: Tensor
    targets: Tensor
    _exact: dict[str, Outputs] = field(default_factory=dict)

    def delta_of(self, pattern: str) -> Weights:
        """Δw of the parameters whose name matches."""
        return {name: d for name, d in self.delta.items() if re.search(pattern, name)}

    def exact(self, pattern: str = EVERYTHING) -> Outputs:
        """f and J Δw of the matching parameters, float64 (B, classes), by torch.func.jvp."""
        if pattern not in self._exact:
            delta = {name: d.double() for name, d in self.delta_of(pattern).items()}
            model = copy.deepcopy(self.model).double()
            self._exact[pattern] = torch_jvp(model, self.images.double(), delta)
        return self._exact[pattern]

    def besides(self, pattern: str) -> Tensor | None:
        """J Δw of the parameters that do not match, float32 (B, classes); None if all do."""
        if pattern == EVERYTHING:
            return None
        _, whole = self.exact()
        return (whole if pattern == NOTHING else whole - self.exact(pattern)[1]).float()


@dataclass(frozen=True)
class Subject:
    """A model as a provider runs it.

    Attributes:
        run: gives f and the tangent that this provider computes, or f alone; (B, classes) each.
        trained: the leaves whose gradients a step gives, by the model's parameter names.
        given: the rest of JΔw, or None.
    """

    run: Call
    trained: Weights
    given: Tensor | None


class ModelWorkload:
    """Ops are names of timm models, shapes (images,), at the model's own size of images.

    Results are f and JΔw; of a step, gradients of one parameter of each kind, those that TAFT-1
    trains first: it gives no others.
    """

    groups = (FORWARD, STEP)

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        full = extent == "full"
        if device.type == "cpu":
            dtype, sizes = "fp32", [(MODELS[0], 8)]
            more = [(name, 2) for name in MODELS[1:]]
        else:
            dtype, sizes = "bf16", [(name, 64) for name in MODELS]
            more = [(name, 8) for name in MODELS]  # where launches weigh more
        return [
            Case(group, name, (images,), dtype)
            for group in self.groups
            for name, images in (sizes + more if full else sizes)
        ]

    def providers(self, case: Case) -> Sequence[Provider]:
        """TAFT in its forms, fine-tuning as the yardstick, rivals, and what compiling gains."""
        step = case.group == STEP
        tangent, plain = ("tangent-step", "ordinary-step") if step else ("dual", "primal")
        last, tail = {"last_block": True}, {"last_block": True, "trunk": False}
        found = [
            _provider("taft-all", taft, _asks(tangent)),
            _provider("taft-1", partial(taft, blocks=1), _asks(tangent, **last)),
            _provider(
                "taft-1-cached", partial(taft, blocks=1, cached=True), _asks(tangent, **tail)
            ),
            _provider("finetune", finetune, _asks(plain)),
        ]
        if step:  # without gradients it is "finetune" over again
            found.append(_provider("finetune-1", partial(finetune, blocks=1), _asks(plain, **last)))
        found.append(_provider("torch-jvp", by_torch_jvp, _asks(tangent)))
        if not step:
            name = "finite-differences"
            slack = finite_difference_slack(self.bound(case))
            found.append(_provider(name, by_finite_differences, _asks(name), slack=slack))
        plain_ones = {one.name: one for one in found}
        for name, way in {
            "taft-all": partial(taft, compiled=True),
            "taft-1": partial(taft, blocks=1, compiled=True),
            "finetune": partial(finetune, compiled=True),
        }.items():
            same = plain_ones[name].cost
            found.append(_provider(f"{name}-compiled", way, same, why_not=compiling_is_too_slow))
        return found

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        return _operands(case.op, case.shape[0], case.torch_dtype, device, seed)

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """In float64: f and JΔw; or Jᵀ times the loss's gradient at f + JΔw, by plain autograd."""
        f, tangent = inputs.exact()
        if case.group == FORWARD:
            return f, tangent
        logits = (f + tangent).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, inputs.targets), logits)
        model = copy.deepcopy(inputs.model).double()
        names = representatives(model)
        weights = [model.get_parameter(name).requires_grad_() for name in names]
        return torch.autograd.grad(model(inputs.images.double()), weights, grad)

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """All of it."""
        return outputs

    def bound(self, case: Case) -> float:
        """A few times what ordinary fine-tuning errs: 1.2e-6, 1.3e-3 and 1.6e-2."""
        return {"fp32": 2e-5, "fp16": 5e-3, "bf16": 5e-2}[case.dtype]


@functools.lru_cache(maxsize=1)  # both groups ask, and the exact tangent takes long
def _operands(
    name: str, images: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Operands:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = random_vit(name)
        delta = {n: 0.01 * torch.randn_like(p) for n, p in model.named_parameters()}
        batch, targets = random_batch(model, images)
    delta = {n: d.to(device, dtype) for n, d in delta.items()}
    return Operands(model.to(device, dtype), delta, batch.to(device, dtype), targets.to(device))


# --- the ways to run a model ---------------------------------------------------------------------


def taft(
    operands: Operands, blocks: int | None = None, cached: bool = False, compiled: bool = False
) -> Subject:
    """This library's; the last blocks alone trained, on tokens computed before, or compiled."""
    pattern = EVERYTHING if blocks is None else last_blocks(operands.model, blocks)
    tangent = linearize(operands.model, pattern, check=False)
    tangent.load_delta_dict(operands.delta_of(pattern))
    model, inputs = tangent, operands.images
    if cached:
        trunk, model = tangent.split()
        inputs = trunk(inputs)
    run: Callable = model.primal_and_tangent
    if compiled:
        run = torch.compile(run, dynamic=False)
    return Subject(lambda: run(inputs), {**tangent.deltas()}, operands.besides(pattern))


def finetune(operands: Operands, blocks: int | None = None, compiled: bool = False) -> Subject:
    """The ordinary model, its last blocks alone trained, or compiled."""
    pattern = EVERYTHING if blocks is None else last_blocks(operands.model, blocks)
    model = copy.deepcopy(operands.model)
    trained = {n: p for n, p in model.named_parameters() if re.search(pattern, n)}
    for parameter in trained.values():
        parameter.requires_grad_()
    run: Callable = torch.compile(model, dynamic=False) if compiled else model
    return Subject(lambda: (run(operands.images),), trained, operands.besides(NOTHING))


def by_torch_jvp(operands: Operands) -> Subject:
    delta = {name: d.detach().requires_grad_() for name, d in operands.delta.items()}
    return Subject(lambda: torch_jvp(operands.model, operands.images, delta), delta, None)


def by_finite_differences(operands: Operands) -> Subject:
    """Two ordinary forward passes: a tangent with half the digits, at best."""
    model, images = operands.model, operands.images
    weights = dict(model.named_parameters())
    step = finite_difference_step(images.dtype)

    def run() -> Outputs:
        f = model(images)
        moved = {name: w + step * operands.delta[name] for name, w in weights.items()}
        return f, (functional_call(model, moved, images) - f) / step

    return Subject(run, {}, None)


# --- from a model to the call that is timed ------------------------------------------------------


def _provider(
    name: str, way: Callable[[Operands], Subject], cost: Callable[[Case], Cost], **more
) -> Provider:
    def prepare(case: Case, operands: Operands) -> Call:
        subject = way(operands)
        if case.group == FORWARD:
            return torch.no_grad()(lambda: _forward(subject))
        names = [name for name in representatives(operands.model) if name in subject.trained]
        return lambda: _step(subject, operands.targets, names)

    return Provider(name, prepare, cost, **more)


def _forward(subject: Subject) -> Outputs:
    f, *tangent = subject.run()
    if subject.given is None:
        return f, *tangent
    return f, *(one + subject.given for one in tangent)


def _step(subject: Subject, targets: Tensor, names: Sequence[str]) -> Outputs:
    """Forward, loss, backward, gradients dropped but for the named ones; no optimizer."""
    f, *tangent = subject.run()
    logits = sum(tangent, start=f).float()  # as fit takes the loss of 16-bit logits
    if subject.given is not None:
        logits = logits + subject.given
    F.cross_entropy(logits, targets).backward()
    found: Any = tuple(subject.trained[name].grad for name in names)
    for parameter in subject.trained.values():
        parameter.grad = None
    return found


def _asks(question: str, **part: bool) -> Callable[[Case], Cost]:
    return lambda case: cost(question, case.op, case.torch_dtype, case.shape[0], **part)
