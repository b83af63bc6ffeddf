"""What the suites of single ops share: operands, the calls that are timed, and providers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Call, Outputs, Provider

Tensors = tuple[Tensor, ...]
Op = Callable[..., Tensor]  # of the primals
Pair = tuple[Tensor, Tensor]  # output and tangent


@dataclass(frozen=True)
class Operands:
    """Operands of one call."""

    op: Op  # what is computed, by PyTorch's functions
    primals: Tensors  # the op's inputs and parameters
    tangents: Tensors  # of the primals
    grads: Pair  # cotangents of the output and of its tangent

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The same op on changed tensors."""
        every = (self.primals, self.tangents, self.grads)
        changed: Any = (tuple(map(change, tensors)) for tensors in every)
        return Operands(self.op, *changed)


def call_of(provider: Provider, kind: str, inputs: Operands) -> Call:
    """What is timed of a provider.

    A provider whose question is "primal" gives the output alone. The gradients are then those of
    the primals under the cotangent of the output's tangent: they equal the gradients of the
    tangents, so they are checked with them.

    Args:
        provider: its function takes op, primals and tangents and gives output and tangent.
        kind: what the call gives:
            "forward": output and tangent;
            "backward": the gradients of the tangents, given the cotangent of the output's tangent;
            the forward pass has run, its graph is kept;
            "second-order": likewise the gradients of tangents, then primals, given both cotangents;
            "step": the output, the gradients of "backward" and the output's tangent, by a forward
            and a backward pass.
        inputs: of the call.
    """
    answer, op, primals, (grad, grad_t) = provider.answer, inputs.op, inputs.primals, inputs.grads
    plain = provider.question == "primal"
    moved = primals if plain else inputs.tangents
    if kind != "forward":
        moved = leaves(moved)
    if kind == "second-order":
        primals = leaves(primals)

    def forward() -> Outputs:
        return (answer(op, moved, None),) if plain else answer(op, primals, moved)

    def step() -> Outputs:
        first, *rest = outputs = forward()
        return first.detach(), *torch.autograd.grad(outputs[-1], moved, grad_t), *rest

    if kind == "forward":
        return torch.no_grad()(forward)
    if kind == "step":
        return step
    outputs = forward()
    if kind == "backward" or plain:
        return lambda: torch.autograd.grad(outputs[-1], moved, grad_t, retain_graph=True)
    wanted = (*moved, *primals)
    return lambda: torch.autograd.grad(outputs, wanted, (grad, grad_t), retain_graph=True)


def leaves(tensors: Tensors) -> Tensors:
    """The tensors, detached, as leaves that require gradients."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def in_dual_level(op: Op, primals: Tensors, tangents: Tensors) -> Pair:
    with forward_ad.dual_level():
        output = op(*map(forward_ad.make_dual, primals, tangents))
        primal, tangent = forward_ad.unpack_dual(output)
    assert tangent is not None
    return primal, tangent


def torch_jvp(op: Op, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Pair:
    """By PyTorch alone, whose only attention with a forward derivative is MATH."""
    with sdpa_kernel(SDPBackend.MATH):
        return _jvp(op, primals, tangents)


def _jvp(op: Op, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Pair:
    output, output_t, *_ = torch.func.jvp(op, primals, tangents)
    return output, output_t


def compiled(op: Op, primals: Tensors, tangents: Tensors) -> Pair:
    return _compiled_jvp(op)(primals, tangents)


@functools.cache
def _compiled_jvp(op: Op) -> Callable[[Tensors, Tensors], Pair]:
    functorch_config.donated_buffer = False  # a backward pass runs many times
    return torch.compile(lambda primals, tangents: _jvp(op, primals, tangents), dynamic=False)


def finite_differences(op: Op, primals: Tensors, tangents: Tensors) -> Pair:
    """Two ordinary forward passes."""
    step = finite_difference_step(primals[0].dtype)
    output = op(*primals)
    moved = op(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    return output, (moved - output) / step


def finite_difference_step(dtype: torch.dtype) -> float:
    """The h of (f(p + h t) - f(p)) / h: √eps, rounded up to a power of two.

    The difference rounds at eps |f| / h, and the curvature adds h |f''|: both are then √eps where
    p, t and the derivatives are of one size. A power of two multiplies and divides exactly.
    float32: 2^-11; float16: 2^-5; bfloat16: 2^-3.
    """
    return 2.0 ** math.ceil(math.log2(torch.finfo(dtype).eps) / 2)
