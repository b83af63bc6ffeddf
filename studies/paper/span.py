"""`Span`: a tangent model's training in the span of its samples' Jacobian rows.

A gradient of a tangent model is Jᵀg, with g of the batch's logits. So gradient descent from zero
stays at Δ = Jᵀc, and the logits of all samples are f₀ + J Jᵀ c: with the kernel J Jᵀ, a step costs
a few rows of it, and no pass through the model (Jacot, Gabriel, Hongler, "Neural Tangent Kernel",
NeurIPS 2018; here the model is the linear one, so nothing is approximated). Deltas are linear in c:
the mean of shards' deltas is that of the mean of their c.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tangent_ops import CachedFeatures, LinearizedModel, Recipe
from tangent_ops.delta import Delta
from tangent_ops.exact import Problem
from tangent_ops.exact.tangent_kernel import TangentKernel, decomposed
from tangent_ops.losses import loss_gradient

MOMENTUM = 0.9  # of `Recipe(optimizer="momentum")`
REFINEMENTS = 4
SAMPLES = 128  # in a block of the kernel


class Span:
    """The kernel of some samples, N of them with C outputs, and what follows from it.

    Args:
        tangent: With deltas of zero.
        data: The samples.

    Attributes:
        problem: Of these samples with the square loss; its l2 is of no account.
    """

    def __init__(self, tangent: LinearizedModel, data: CachedFeatures) -> None:
        options: dict[str, Any] = {"representation": "factors", "progress": False}
        self.problem = Problem(tangent, data, 1.0, batch_size=SAMPLES, **options)
        self._kernel = TangentKernel(self.problem.system)
        # On the CPU, wherever the model is: so are the indices and what is made of them.
        self._gram, self._start = self._kernel.gram.cpu(), self._kernel.anchor_logits.cpu()
        self._targets = data.targets
        self._shape = (self._kernel.samples, self._kernel.outputs)
        # The square loss has the Hessian (2/C) I by the logits, for every sample.
        self._curvature = 2 / self._kernel.outputs
        self._wanted = self._kernel.wanted.cpu() / self._curvature**0.5

    def descend(
        self,
        indices: Tensor,
        loss: nn.Module,
        *,
        lr: float | Sequence[float],
        epochs: int,
        batch: int,
        seed: int,
    ) -> Tensor:
        """SGD with momentum on some samples: ``fit(..., optimizer="momentum")``, but for rounding.

        Args:
            indices: (n,) of the samples; their order counts, since batches are drawn from it.
            loss: Mean over a batch.
            lr: At the start; then as `Recipe` has it. Several cost little more than one.
            epochs: Passes over the samples.
            batch: Samples of a step.
            seed: Of the order.

        Returns:
            (N, C): c, zero for other samples; (R, N, C) for R rates. Not finite if it diverged.
        """
        rates = torch.tensor([lr] if isinstance(lr, float) else lr)
        recipe = Recipe(epochs=epochs, lr=1.0, optimizer="momentum", batch_size=batch, seed=seed)
        count, outputs = len(indices), self._shape[1]
        gram = self._of(indices, indices).float().view(count, outputs, -1)
        start, targets = self._start[indices].float(), self._targets[indices]
        weights, velocity = (torch.zeros(count, outputs, len(rates)) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            loader = DataLoader([*range(count)], batch, shuffle=True)  # type: ignore[arg-type]
            steps, done = epochs * len(loader), 0
            for _ in range(epochs):
                for rows in loader:
                    moved = gram[rows].flatten(0, 1) @ weights.flatten(0, 1)
                    logits = start[rows, :, None] + moved.view(len(rows), outputs, -1)
                    velocity *= MOMENTUM
                    for number, one in enumerate(logits.unbind(2)):
                        gradient = loss_gradient(loss, one, targets[rows])[1]
                        velocity[rows, :, number] += gradient
                    weights -= recipe.lr_at(done / steps) * rates * velocity
                    done += 1
        every = torch.zeros(len(rates), *self._shape, dtype=torch.float64)
        every[:, indices] = weights.double().movedim(2, 0)
        return every[0] if isinstance(lr, float) else every

    def solve(self, indices: Tensor, l2: float, public: Tensor | None = None) -> Tensor:
        """The optimum of the mean square loss of some samples plus l2/2 ‖Δ‖², as c: (N, C).

        By Cholesky's factors in float32, and steps that take their rounding out in float64.

        Args:
            indices: (n,) of the samples.
            l2: The penalty's weight.
            public: (p,) of other samples that take part as `tangent_ops.with_public` has it.
        """
        outputs, wanted = self._shape[1], self._wanted[indices]
        if public is not None:
            scale = 1 + len(public) / len(indices)
            wanted = torch.cat([scale * wanted, wanted.new_zeros(len(public), outputs)])
            indices = torch.cat([indices, public])
        wanted = wanted.reshape(-1, 1)
        matrix = self._of(indices, indices).clone()
        matrix.diagonal().add_(len(indices) * l2 / self._curvature)
        factor, solved = decomposed(matrix.float(), l2), torch.zeros_like(wanted)
        for _ in range(REFINEMENTS):
            rest = wanted - matrix @ solved
            solved += torch.cholesky_solve(rest.float(), factor).double()
        every = torch.zeros(self._shape, dtype=torch.float64)
        every[indices] = solved.view(-1, outputs)
        return every

    def logits(self, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        """(N, C), or of some samples: what the model with delta Jᵀc says, in float64."""
        of = torch.arange(self._shape[0]) if indices is None else indices
        used = weights.abs().amax(dim=1).nonzero().flatten()
        moved = self._of(of, used) @ weights[used].flatten()
        return self._start[of] + moved.view(len(of), -1)

    def delta(self, weights: Tensor) -> Delta:
        """Jᵀc, by passes over the samples that it is not zero for."""
        used = weights.abs().amax(dim=1).nonzero().flatten()
        some = copy.copy(self._kernel)
        some.passes = some.passes.take(used.tolist())
        placed = weights[used].to(self._kernel.gram.device)
        return Delta(some.passes.layout.named(some.pull_back(placed)))

    def _of(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A block of the kernel; a view, if the samples follow each other."""
        outputs = self._shape[1]
        if _follow(rows) and _follow(columns):
            by, of = (
                slice(int(i[0]) * outputs, (int(i[-1]) + 1) * outputs) for i in (columns, rows)
            )
            return self._gram[of, by]
        each = torch.arange(outputs)
        of, by = ((i[:, None] * outputs + each).flatten() for i in (rows, columns))
        return self._gram[of[:, None], by]


def _follow(indices: Tensor) -> bool:
    return len(indices) > 0 and bool((indices.diff() == 1).all())
