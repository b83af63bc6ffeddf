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
from tangent_ops.family import logits_pair
from tangent_ops.fields import Inputs
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
        self._vmaps = True

    def in_double(self) -> Jacobian:
        """The same in float64, of a copy of the model."""
        return Jacobian(copy.deepcopy(self.tangent).double())

    def unpack(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Inputs and targets of a loader's batch, on the model's device."""
        return unpack(batch, self.device)

    def outputs(self, delta: Tensor | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """f(x) and J(x) Δ for a batch, without gradients; None for Δ = 0."""
        with torch.no_grad():
            parts = self.layout.views(self.layout.zeros() if delta is None else delta)
            primal, tangent = self._call(parts, inputs)
        return at_least_single(primal), at_least_single(tangent)

    def pull_back(
        self, direction: Tensor, inputs: Inputs, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """J(x)ᵀ c in parts, shaped as the deltas; c may depend on f(x) and J(x) v.

        Both products come from one forward pass: the derivative of J v by v is J, whatever v is.
        """
        leaves = [part.detach().requires_grad_() for part in self.layout.views(direction)]
        with torch.enable_grad():
            primal, tangent = self._call(leaves, inputs)
        pulled = cotangent(at_least_single(primal.detach()), at_least_single(tangent.detach()))
        return list(_grads(tangent, leaves, pulled.to(tangent.dtype)))

    def outputs_many(self, directions: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """f(x), (n, ...), and J(x) v for each row v of (R, P), (R, n, ...), without gradients."""
        primal, first = self.outputs(directions[0], inputs)
        return primal, torch.cat([first[None], self._tangents(directions[1:], inputs, first)])

    def pull_back_many(
        self, directions: Tensor, inputs: Inputs, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """J(x)ᵀ c_r for R cotangents, (R, P); they may depend on f(x) and J(x) v_r.

        Args:
            directions: v_r, (R, P).
            inputs: (n, ...), a batch.
            cotangent: f(x), (n, ...), and J(x) v_r, (R, n, ...), to c_r, shaped as J(x) v_r.
        """
        leaves = [part.detach().requires_grad_() for part in self.layout.views(directions[0])]
        with torch.enable_grad():
            primal, tangent = self._call(leaves, inputs)
        first = at_least_single(tangent.detach())
        tangents = torch.cat([first[None], self._tangents(directions[1:], inputs, first)])
        cotangents = cotangent(at_least_single(primal.detach()), tangents).to(tangent.dtype)
        pulled = torch.empty_like(directions)
        for index, one in enumerate(cotangents):
            last = index + 1 == len(cotangents)
            grads = _grads(tangent, leaves, one, retain_graph=not last)
            torch.cat([grad.reshape(-1) for grad in grads], out=pulled[index])
        return pulled

    def _tangents(self, directions: Tensor, inputs: Inputs, like: Tensor) -> Tensor:
        """J(x) v for each of the directions, shaped as `like`, which another one has given."""
        if not len(directions):
            return like.new_empty(0, *like.shape)
        parts = [
            part.view(-1, *shape)
            for part, shape in zip(
                directions.split(self.layout.sizes, dim=1), self.layout.shapes.values(), strict=True
            )
        ]
        with torch.no_grad():
            if self._vmaps and len(directions) > 1:
                try:
                    every = torch.func.vmap(lambda one: self._call(one, inputs)[1])(parts)
                    return at_least_single(every)
                except RuntimeError:  # an operation of the model cannot be batched
                    self._vmaps = False
            every = [self._call(one, inputs)[1] for one in zip(*parts, strict=True)]
            return at_least_single(torch.stack(every))

    def rows(self, one: Inputs) -> Tensor:
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
                grads = _grads(output, leaves, None, retain_graph=not last)
                torch.cat([grad.reshape(-1) for grad in grads], out=rows[index])
        return rows

    def _call(self, parts: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
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

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return logits_pair(self.tangent, inputs)


def _grads(
    tangent: Tensor, leaves: list[Tensor], cotangent: Tensor | None, *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients by the leaves; zeros by those that the output does not depend on."""
    return torch.autograd.grad(
        tangent,
        leaves,
        cotangent,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
