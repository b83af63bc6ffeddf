"""`Jacobian`: products with J(x), the Jacobian of a tangent model's output by its deltas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tangent_ops.data import unpack
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.layout import Layout
from tangent_ops.losses import at_least_single
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call


class Jacobian:
    """f(x) and J(x) of a tangent model, whose deltas are neither read nor changed.

    Vectors that J maps are flat; see `Layout`.

    Attributes:
        tangent: the model.
    """

    def __init__(self, tangent: LinearizedModel) -> None:
        self.layout = Layout.of(tangent)
        self.device = self.layout.device
        self.tangent = tangent
        self._pair = Pair(tangent)

    def in_double(self) -> Jacobian:
        """The same in float64, of a copy of the model."""
        return Jacobian(copy.deepcopy(self.tangent).double())

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a loader's batch, on the model's device."""
        return unpack(batch, self.device)

    def outputs(self, delta: Tensor | None, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and J(x) Δ for a batch, without gradients; None for Δ = 0."""
        with torch.no_grad():
            parts = self.layout.views(self.layout.zeros() if delta is None else delta)
            primal, tangent = self._call(parts, inputs)
        return at_least_single(primal), at_least_single(tangent)

    def pull_back(
        self, direction: Tensor, inputs: Tensor, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """J(x)ᵀ c in parts, shaped as the deltas; c may depend on f(x) and J(x) v.

        Both products come from one forward pass: the derivative of J v by v is J, whatever v is.
        """
        leaves = [part.detach().requires_grad_() for part in self.layout.views(direction)]
        with torch.enable_grad():
            primal, tangent = self._call(leaves, inputs)
        pulled = cotangent(at_least_single(primal.detach()), at_least_single(tangent.detach()))
        return list(torch.autograd.grad(tangent, leaves, pulled.to(tangent.dtype)))

    def rows(self, one: Tensor) -> Tensor:
        """The rows of J(x), (C, P), for one input of shape (1, ...) with C outputs."""
        leaves = [part.requires_grad_() for part in self.layout.views(self.layout.zeros())]
        with torch.enable_grad():
            _, tangent = self._call(leaves, one)
            outputs = tangent.flatten()
            rows = torch.empty(
                len(outputs), self.layout.size, dtype=self.layout.dtype, device=self.device
            )
            for index, output in enumerate(outputs):
                last = index + 1 == len(outputs)
                grads = torch.autograd.grad(output, leaves, retain_graph=not last)
                torch.cat([grad.reshape(-1) for grad in grads], out=rows[index])
        return rows

    def _call(self, parts: Sequence[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        names = [f"tangent.delta.{name}" for name in self.layout.shapes]
        deltas = dict(zip(names, parts, strict=True))
        with torch.autocast(self.device.type, enabled=False):
            primal, tangent = functional_call(self._pair, deltas, (inputs.to(self.device),))
        if not isinstance(primal, Tensor) or len(primal) != len(inputs):
            raise UnsupportedError(
                f"the model's output is a {type(primal).__name__}; exact fits need one tensor with "
                "a row to each sample"
            )
        return primal, tangent


class Pair(nn.Module):
    """A module for functional_call that returns the model's value and tangent separately."""

    def __init__(self, tangent: LinearizedModel) -> None:
        super().__init__()
        self.tangent = tangent

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.tangent.primal_and_tangent(inputs)
