"""Whole vision transformers: forward with tangent, and a training step without optimizer.

All providers of a case answer the same question: f and JΔw for a Δw of *all* parameters; in a
step, gradients of the cross-entropy at f + JΔw. A provider that computes a part of JΔw, as TAFT-1
does, is *given* the rest, a constant of (images, classes), and adds it. A step of ordinary
fine-tuning is given all of it: the backward pass of TAFT is the anchor's own, so fine-tuning's
gradients are TAFT's, and are checked with theirs.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from tangent_kernels.timing import capture
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import ops
from benchmarks.case import (
    Call,
    Case,
    Cost,
    Extent,
    Outputs,
    Provider,
    Suite,
    compiling_is_slow,
    needs_cuda,
)
from benchmarks.roofline import forward_cost, model_cost
from tangent_ops import last_blocks, linearize
from tangent_ops.family import block_names
from tangent_ops.model.features import Tail

Weights = dict[str, Tensor]

FORWARD, STEP = "model-forward", "train-step"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
EVERYTHING, NOTHING = "", "$^"  # patterns of parameter names


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


def trained_parameters(model: nn.Module, pattern: str) -> Weights:
    """The parameters whose names match, which require gradients from now on."""
    named = model.named_parameters()
    return {name: p.requires_grad_() for name, p in named if re.search(pattern, name)}


def torch_jvp(model: nn.Module, images: Tensor, delta: Weights) -> tuple[Tensor, Tensor]:
    """f and JΔw by PyTorch alone."""
    weights = {name: model.get_parameter(name) for name in delta}
    return ops.torch_jvp(lambda some: functional_call(model, some, images), (weights,), (delta,))


def least_work(
    kind: str, question: str, case: Case, dtype: torch.dtype, images: int, part: str
) -> Cost:
    """Of a call of the case's model, with weights of this dtype; `part` as in Provider.

    Below the last block, norm and head ("last") the trunk runs forward alone.
    """
    whole, tail = _forward_costs(case.op, dtype, images)
    asked = model_cost(kind, question, whole if part == "all" else tail)
    if part != "last":
        return asked
    return Cost(asked.flops + whole.flops - tail.flops, asked.bytes + whole.bytes - tail.bytes)


@functools.cache
def _forward_costs(name: str, dtype: torch.dtype, images: int) -> tuple[Cost, Cost]:
    """Of the model, and of its last block, norm and head."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).to(dtype)
    tail, tokens = Tail(model, len(block_names(model)) - 1), model.pos_embed.shape[1:]
    whole = forward_cost(model, (images, *model.pretrained_cfg["input_size"]))
    return whole, forward_cost(tail, (images, *tokens))  # class token included


@dataclass
class Operands:
    """A model at w0, a Δw, and a batch."""

    model: Any  # in eval mode, frozen, all its parameters random
    delta: Weights  # Δw of all parameters by name, normal with standard deviation 1e-2
    images: Tensor  # (B, 3, H, W)
    targets: Tensor  # (B,), class indices
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

    def besides(self, pattern: str) -> Tensor | float:
        """J Δw of the parameters that do not match, float32 (B, classes); 0 if all do."""
        if pattern == EVERYTHING:
            return 0.0
        _, whole = self.exact()
        return (whole if pattern == NOTHING else whole - self.exact(pattern)[1]).float()


@dataclass(frozen=True)
class Subject:
    """A model as a provider runs it."""

    run: Call  # gives f and the tangent that this provider computes, or f alone: (B, classes)
    trained: Weights  # the leaves whose gradients a step gives, by the model's parameter names
    given: Tensor | float  # the rest of JΔw; 0 if there is none


class ModelSuite(Suite):
    """Ops are names of timm models, shapes (images,), at the model's own size of images.

    A provider's function takes Operands and gives a Subject. Results are f and JΔw; of a step, the
    gradients of one parameter of each kind. Those of TAFT-1 come first: it gives no others.
    """

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        if device.type == "cpu":
            dtype, sizes = "fp32", [(MODELS[0], 8)]
            more = [(name, 2) for name in MODELS[1:]]
        else:
            dtype, sizes = "bf16", [(name, 64) for name in MODELS]
            more = [(name, 8) for name in MODELS]  # where launches weigh more
        return [
            Case(group, name, (images,), dtype)
            for group in (FORWARD, STEP)
            for name, images in (sizes + more if extent == "full" else sizes)
        ]

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
        weights = [model.get_parameter(name).requires_grad_() for name in _compared(model)]
        return torch.autograd.grad(model(inputs.images.double()), weights, grad)

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        subject = provider.answer(inputs)
        call: Call = torch.no_grad()(lambda: _forward(subject))
        if case.group == STEP:
            names = [name for name in _compared(inputs.model) if name in subject.trained]
            call = lambda: _step(subject, inputs.targets, names)  # noqa: E731
        return _graphed(call) if provider.graphed else call

    def bound(self, case: Case) -> float:
        """A few times what ordinary fine-tuning errs: 1.2e-6, 1.3e-3 and 1.6e-2."""
        return {"fp32": 2e-5, "fp16": 5e-3, "bf16": 5e-2}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        kind = "step" if case.group == STEP else "forward"
        images, dtype = case.shape[0], case.torch_dtype
        return least_work(kind, provider.question, case, dtype, images, provider.part)


@functools.lru_cache(maxsize=1)  # both groups use it, and the exact tangent takes long
def _operands(
    name: str, images: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Operands:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = random_vit(name)
        delta = {n: 0.01 * torch.randn_like(p) for n, p in model.named_parameters()}
        inputs, targets = random_batch(model, images)
    return Operands(
        model.to(device, dtype),
        {n: d.to(device, dtype) for n, d in delta.items()},
        inputs.to(device, dtype),
        targets.to(device),
    )


def _compared(model: Any) -> list[str]:
    """Parameters whose gradients are compared: one of each kind, those of TAFT-1 first."""
    end = f"blocks.{len(block_names(model)) - 1}"
    late = [f"{end}.attn.qkv.weight", f"{end}.mlp.fc2.weight", "norm.weight", "head.weight"]
    return [*late, "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"]


def _forward(subject: Subject) -> Outputs:
    f, *tangent = subject.run()
    return f, *(one + subject.given for one in tangent)


def _step(subject: Subject, targets: Tensor, names: Sequence[str]) -> Outputs:
    """Forward, loss, backward; the gradients are dropped but for the named ones."""
    f, *tangent = subject.run()
    # As fit takes the loss of 16-bit logits.
    logits = sum(tangent, start=f).float() + subject.given
    F.cross_entropy(logits, targets).backward()
    found: Any = tuple(subject.trained[name].grad for name in names)
    for parameter in subject.trained.values():
        parameter.grad = None
    return found


def _graphed(call: Call) -> Call:
    """The same work as a CUDA graph, which a call replays: without Python and single launches."""
    captured = capture([call])

    def replay() -> Outputs:
        captured.replay()
        return captured.results[0]

    return replay


SUITE = ModelSuite()


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


def ordinary(operands: Operands, blocks: int | None = None, compiled: bool = False) -> Subject:
    """The ordinary model, its last blocks alone trained, or compiled."""
    pattern = EVERYTHING if blocks is None else last_blocks(operands.model, blocks)
    model = copy.deepcopy(operands.model)
    trained = trained_parameters(model, pattern)
    run: Callable = torch.compile(model, dynamic=False) if compiled else model
    return Subject(lambda: (run(operands.images),), {**trained}, operands.besides(NOTHING))


PLAIN: Any = {"question": "primal"}
SUITE.provider("taft-all")(taft)
SUITE.provider("taft-1", part="last")(partial(taft, blocks=1))
SUITE.provider("taft-1-cached", part="tail")(partial(taft, blocks=1, cached=True))
SUITE.provider("finetune", **PLAIN)(ordinary)
SUITE.provider("finetune-1", groups=(STEP,), part="last", **PLAIN)(partial(ordinary, blocks=1))


@SUITE.provider("torch-jvp")
def by_torch_jvp(operands: Operands) -> Subject:
    delta = {name: d.detach().requires_grad_() for name, d in operands.delta.items()}
    return Subject(lambda: torch_jvp(operands.model, operands.images, delta), delta, 0.0)


@SUITE.provider("finite-differences", groups=(FORWARD,), question="finite-differences")
def by_finite_differences(operands: Operands) -> Subject:
    """Two ordinary forward passes."""
    model, images = operands.model, operands.images
    weights = dict(model.named_parameters())
    step = ops.finite_difference_step(images.dtype)

    def run() -> Outputs:
        f = model(images)
        moved = {name: w + step * operands.delta[name] for name, w in weights.items()}
        return f, (functional_call(model, moved, images) - f) / step

    return Subject(run, {}, 0.0)


SLOW: Any = {"missing": compiling_is_slow}
SUITE.provider("taft-all-compiled", **SLOW)(partial(taft, compiled=True))
SUITE.provider("taft-1-compiled", part="last", **SLOW)(partial(taft, blocks=1, compiled=True))
SUITE.provider("finetune-compiled", **SLOW, **PLAIN)(partial(ordinary, compiled=True))
GRAPHED: Any = {"missing": needs_cuda, "graphed": True}
SUITE.provider("taft-all-graph", **GRAPHED)(taft)
SUITE.provider("finetune-graph", **GRAPHED, **PLAIN)(ordinary)
SUITE.provider("taft-all-compiled-graph", **GRAPHED)(partial(taft, compiled=True))
SUITE.provider("finetune-compiled-graph", **GRAPHED, **PLAIN)(partial(ordinary, compiled=True))


def test_model_forward(provider, benchmark) -> None:
    provider.time(benchmark)


def test_train_step(provider, benchmark) -> None:
    provider.time(benchmark)
