"""`Span`: a tangent model's training in the span of its samples' Jacobian rows.

A gradient of a tangent model is Jᵀg, with g of the batch's logits. So gradient descent from zero
stays at Δ = Jᵀc, and the logits of all samples are f₀ + J Jᵀ c: with the kernel J Jᵀ, a step costs
a few rows of it, and no pass through the model (Jacot, Gabriel, Hongler, "Neural Tangent Kernel",
NeurIPS 2018; here the model is the linear one, so nothing is approximated). Deltas are linear in c:
the mean of shards' deltas is that of the mean of their c.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tangent_ops import CachedFeatures, LinearizedModel, Recipe
from tangent_ops.delta import Delta
from tangent_ops.exact import Problem
from tangent_ops.exact.tangent_kernel import TangentKernel, decomposed
from tangent_ops.losses import loss_gradient

MOMENTUM = 0.9  # of `Recipe(optimizer="momentum")`


class Span:
    """The kernel of some samples, N of them with C outputs, and what follows from it.

    Args:
        tangent: With deltas of zero.
        data: The samples.

    Attributes:
        problem: Of these samples with the square loss; its l2 is of no account.
    """

    def __init__(self, tangent: LinearizedModel, data: CachedFeatures) -> None:
        self.problem = Problem(tangent, data, 1.0, representation="factors", progress=False)
        self._kernel = TangentKernel(self.problem.system)
        self._targets = data.targets
        self._shape = (self._kernel.samples, self._kernel.outputs)

    def descend(
        self, indices: Tensor, loss: nn.Module, *, lr: float, epochs: int, batch: int, seed: int
    ) -> Tensor:
        """SGD with momentum on some samples: ``fit(..., optimizer="momentum")``, but for rounding.

        Args:
            indices: (n,) of the samples; their order counts, since batches are drawn from it.
            loss: Mean over a batch.
            lr: At the start; then as `Recipe` has it.
            epochs: Passes over the samples.
            batch: Samples of a step.
            seed: Of the order.

        Returns:
            (N, C): c, zero for other samples.
        """
        recipe = Recipe(epochs=epochs, lr=lr, optimizer="momentum", batch_size=batch, seed=seed)
        count, outputs = len(indices), self._shape[1]
        gram = self._of(indices).float().view(count, outputs, -1)
        start, targets = self._kernel.anchor_logits[indices].float(), self._targets[indices]
        weights, velocity = (torch.zeros(count, outputs) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            loader = DataLoader([*range(count)], batch, shuffle=True)  # type: ignore[arg-type]
            steps, done = epochs * len(loader), 0
            for _ in range(epochs):
                for rows in loader:
                    logits = start[rows] + (gram[rows].flatten(0, 1) @ weights.flatten()).view(
                        len(rows), outputs
                    )
                    velocity *= MOMENTUM
                    velocity[rows] += loss_gradient(loss, logits, targets[rows])[1]
                    weights -= recipe.lr_at(done / steps) * velocity
                    done += 1
        return self._spread(indices, weights.double())

    def solve(self, indices: Tensor, l2: float) -> Tensor:
        """The optimum of the mean square loss of some samples plus l2/2 ‖Δ‖², as c: (N, C)."""
        count, outputs = len(indices), self._shape[1]
        roots, wanted = self._kernel.factors[indices], self._kernel.wanted[indices]
        gram = self._of(indices).view(count, outputs, count, outputs)
        half = torch.einsum("iab,iajd->ibjd", roots, gram)
        matrix = torch.einsum("ibjd,jde->ibje", half, roots).reshape(count * outputs, -1)
        matrix.diagonal().add_(count * l2)
        solved = torch.cholesky_solve(wanted.reshape(-1, 1), decomposed(matrix, l2))
        return self._spread(indices, (roots @ solved.view(count, outputs, 1)).squeeze(2))

    def logits(self, weights: Tensor) -> Tensor:
        """(N, C): what the model with that delta says of the samples, in float64."""
        moved = self._kernel.gram @ weights.flatten()
        return self._kernel.anchor_logits + moved.view(self._shape)

    def delta(self, weights: Tensor) -> Delta:
        """Jᵀc."""
        return self.problem.passes.layout.named(self._kernel.pull_back(weights))

    def _of(self, indices: Tensor) -> Tensor:
        outputs = self._shape[1]
        rows = (indices[:, None] * outputs + torch.arange(outputs)).flatten()
        return self._kernel.gram[rows][:, rows]

    def _spread(self, indices: Tensor, weights: Tensor) -> Tensor:
        every = torch.zeros(self._shape, dtype=torch.float64)
        every[indices] = weights
        return every
