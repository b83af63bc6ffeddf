"""Makes a canary, a sample that is easy to detect in a training, and scores deltas for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tangent_ops.data import check_positive
from tangent_ops.delta import check_layout
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss, RescaledSquareLoss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call


def make_canary(
    tangent: LinearizedModel, inputs: Tensor, gradient_norm: float
) -> tuple[Tensor, Tensor]:
    """A target for `torch.nn.MSELoss` that gives one input's gradient the wanted norm.

    The target differs from the anchor's output in the first entry. If the norm is many times
    max_grad_norm, the gradient stays clipped and keeps its direction when training changes the
    output. So every step reveals the canary as much as the mechanism's analysis assumes, and a
    training that does not clip is detected at once. A class index cannot give such a gradient: it
    fixes the residual, and cross-entropy bounds it. For classes use MSELoss with targets
    M * one_hot(y), which is `RescaledSquareLoss(k=1, M=M)`.

    Args:
        tangent: the model, with one tensor as output.
        inputs: (1, ...): one sample. The less its gradient resembles the others', the better.
        gradient_norm: of the loss at Δ = 0, in the Euclidean norm over all deltas; for example
            1000 times max_grad_norm.

    Returns:
        inputs, and the target, shaped as the model's output.

    Raises:
        ArgumentError: more than one sample, a norm that is not positive, or a zero gradient.
    """
    check_positive(gradient_norm=gradient_norm)
    _check_one(inputs)
    with torch.no_grad():
        output, _ = tangent.primal_and_tangent(inputs)
    residual = torch.zeros_like(output)
    residual.view(-1)[0] = 1.0
    unit = _norm(_gradient(tangent, inputs, output + residual, nn.MSELoss()))
    if unit == 0:
        raise ArgumentError(
            "the gradient of inputs is zero: if the anchor's head is zero, use fit_head first; "
            "otherwise try another input"
        )
    return inputs, output + gradient_norm / unit * residual


def canary_score(
    tangent: LinearizedModel, inputs: Tensor, target: Tensor, loss: Loss | None = None
) -> Callable[[Mapping[str, Tensor]], float]:
    """The attack on a training that starts at zero: the component of Δ along the canary's step.

    The score is -⟨Δ, g / ‖g‖⟩ with g the gradient of the canary's loss at Δ = 0. No score is better
    if the steps only add clipped gradients and noise, and the canary's gradient keeps its direction
    (Nasr et al., "Tight auditing of differentially private machine learning", USENIX Security 2023,
    where the attacker's gradient is that of a Dirac canary).

    Args:
        tangent: the model; its deltas are not used.
        inputs: (1, ...): the canary.
        target: (1, ...).
        loss: as in training; None for `RescaledSquareLoss()`.

    Returns:
        delta -> score, larger if the canary seems to be in.

    Raises:
        ArgumentError: more than one sample, or a gradient that is zero or not finite.
        DeltaError: when called, if the delta does not fit the model.
    """
    _check_one(inputs)
    gradient = _gradient(tangent, inputs, target, loss or RescaledSquareLoss())
    size = _norm(gradient)
    if not (math.isfinite(size) and size > 0):
        raise ArgumentError(f"the canary's gradient has norm {size}: choose another one")

    def score(delta: Mapping[str, Tensor]) -> float:
        check_layout(delta, gradient, "the delta")
        along = sum(
            float((delta[name].detach().double().to(part.device) * part).sum())
            for name, part in gradient.items()
        )
        return -along / size

    return score


def _gradient(
    tangent: LinearizedModel, inputs: Tensor, target: Tensor, loss: Loss
) -> dict[str, Tensor]:
    """The gradient of one sample's loss by the deltas at Δ = 0, by autograd; cast to float64."""
    zeros = {n: torch.zeros_like(d).requires_grad_() for n, d in tangent.deltas().items()}
    with torch.enable_grad():
        parts = {f"delta.{name}": zero for name, zero in zeros.items()}
        value = loss(functional_call(tangent, parts, (inputs,)), target)
        grads = torch.autograd.grad(
            value, list(zeros.values()), allow_unused=True, materialize_grads=True
        )
    return {name: grad.double() for name, grad in zip(zeros, grads, strict=True)}


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))


def _check_one(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim == 0 or len(inputs) != 1:
        got = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else repr(inputs)
        raise ArgumentError(f"inputs must be one sample, of shape (1, ...), got {got}")
