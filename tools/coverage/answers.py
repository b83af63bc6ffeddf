"""A model's value, tangent and gradient by tangent_ops and by PyTorch alone."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import tangent_ops

Named = dict[str, Tensor]
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Question:
    """A model in eval mode, x and Δw; the answer is f(x), J Δw and Jᵀ c."""

    model: nn.Module  # float32, not called yet: in eval mode some models cache what they computed
    input: Tensor  # x
    deltas: Named  # Δw for every parameter


@dataclass(frozen=True)
class Answer:
    primal: Tensors
    tangent: Tensors
    gradient: Named


@dataclass(frozen=True)
class Errors:
    """‖found − exact‖ / ‖exact‖ over all outputs, and over the gradients of all parameters."""

    primal: float
    tangent: float
    gradient: float

    @property
    def largest(self) -> float:
        values = (self.primal, self.tangent, self.gradient)
        return max(values) if all(map(math.isfinite, values)) else math.inf


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with noise on every weight and statistic.

    Many fresh weights are 0, and an error that is multiplied by 0 would not be seen. The noise is a
    tenth of the weights' root mean square, and at least 0.05 for vectors and weights near zero.
    """
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = float(parameter.double().square().mean().sqrt())
            least = 0.05 if parameter.ndim < 2 or size < 1e-3 else 0.0
            parameter.add_(max(0.1 * size, least) * _normal(parameter, noise))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                mean, variance = module.running_mean, module.running_var
                if mean is not None and variance is not None:
                    mean.add_(0.1 * _normal(mean, noise))
                    variance.mul_((0.1 * _normal(variance, noise)).exp())
    return model.eval()


def directions(model: nn.Module, seed: int = 1) -> Named:
    """Δw, normal, with the root mean square of its parameter."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: _normal(p, noise) * p.detach().square().mean().sqrt()
        for name, p in model.named_parameters()
    }


def ours(
    question: Question,
    dtype: torch.dtype = torch.float32,
    during: AbstractContextManager[None] | None = None,
) -> Answer:
    """The answer of `tangent_ops.linearize`, of a model that was called before.

    Args:
        question: the model, x and Δw.
        dtype: of model and input.
        during: context of the linearized model's second call.
    """
    model, x = copy.deepcopy(question.model).to(dtype), question.input.to(dtype)
    with torch.no_grad():
        model(x)
    tangent = tangent_ops.linearize(model, check=False)
    deltas = tangent.deltas()
    with torch.no_grad():
        for name, delta in deltas.items():
            delta.copy_(question.deltas[name])
        tangent(x)
    with during or contextlib.nullcontext():
        primal, primal_t = map(floats, tangent.primal_and_tangent(x))
    return Answer(primal, primal_t, _gradient(primal_t, deltas))


def pytorchs(question: Question, dtype: torch.dtype) -> Answer:
    """The answer of `torch.func.jvp` and ordinary reverse mode, with MATH attention."""
    x = question.input.to(dtype)
    tangents = {name: delta.to(dtype) for name, delta in question.deltas.items()}

    def fresh():
        model = copy.deepcopy(question.model).to(dtype)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return (lambda w: floats(functional_call(model, w, (x,)))), weights

    # nn.TransformerEncoder's fast path and oneDNN's recurrent layers have no forward derivative.
    # Other models keep oneDNN: with other rounding a ReLU could switch here and not in ours.
    recurrent = any(isinstance(module, nn.RNNBase) for module in question.model.modules())
    fast_path, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if recurrent:
        torch.backends.mkldnn.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            run, weights = fresh()
            primal, primal_t, *_ = torch.func.jvp(run, (weights,), (tangents,))
            run, weights = fresh()
            leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
            return Answer(primal, primal_t, _gradient(run(leaves), leaves))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.mkldnn.enabled = onednn  # pyright: ignore[reportAttributeAccessIssue]


def errors(found: Answer, exact: Answer) -> Errors:
    gradients = [list(answer.gradient.values()) for answer in (found, exact)]
    return Errors(
        _distance(found.primal, exact.primal),
        _distance(found.tangent, exact.tangent),
        _distance(*gradients),
    )


def disagreement(question: Question, exact: Answer) -> float:
    """|⟨c, J Δw⟩ − ⟨Jᵀ c, Δw⟩| over the sum of the absolute values of their terms."""
    cotangents = _cotangents(exact.tangent)
    forward = [c * t for c, t in zip(cotangents, exact.tangent, strict=True)]
    reverse = [g * question.deltas[n].double() for n, g in exact.gradient.items()]
    size = sum(float(x.abs().sum()) for x in (*forward, *reverse))
    return abs(sum(float(x.sum()) for x in forward) - sum(float(x.sum()) for x in reverse)) / size


def floats(output: Any) -> list[Tensor]:
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return [x for x in leaves if x.is_floating_point()]


def _gradient(outputs: Tensors, leaves: Mapping[str, Tensor]) -> Named:
    found = torch.autograd.grad(
        outputs, list(leaves.values()), _cotangents(outputs), allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def _cotangents(outputs: Tensors) -> list[Tensor]:
    noise = torch.Generator().manual_seed(2)
    return [_normal(x, noise) for x in outputs]


def _normal(like: Tensor, noise: torch.Generator) -> Tensor:
    """Normal numbers of this shape and dtype, the same in every dtype."""
    return torch.randn(like.shape, generator=noise).to(like.dtype)


def _distance(found: Tensors, exact: Tensors) -> float:
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, exact, strict=True)]
    off = math.hypot(*(float((a - b).norm()) for a, b in pairs))
    size = math.hypot(*(float(b.norm()) for _, b in pairs))
    return off / size if size else math.inf
