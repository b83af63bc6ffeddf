"""The empirical neural tangent kernel J Jᵀ of a data set, and ridge regression by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.problem import Problem
from tangent_ops.losses import loss_gradient, loss_hessians

MAX_ROWS = 20_000  # N C: the matrix has 3.2 GB, and a decomposition takes minutes
MEMORY = 2 << 30  # bytes of rows of J that are held at a time
_COLUMNS = 1 << 16  # of J to a product, summed up in float64


class TangentKernel:
    """K = J Jᵀ, (N C, N C) in float64, and the residuals that ridge regression fits.

    Its rows and columns are the outputs of all samples: those of sample i are i C to i C + C - 1.
    The loss of a sample is ½ ‖Lᵀ(f - y)‖² up to a constant: any quadratic loss has this form.

    Args:
        problem: whose data, in order, and loss.

    Attributes:
        gram: K.
        factors: (N, C, C): L, with A = L Lᵀ the Hessian of the sample's loss by its logits.
        wanted: (N, C): Lᵀ(y - f(x)), what J Δ is drawn to, in the same measure.
        anchor_logits: (N, C): f(x).

    Raises:
        ArgumentError: more than `MAX_ROWS` rows.
        UnsupportedError: the loss is not quadratic, or has no minimum in the logits.
    """

    def __init__(self, problem: Problem) -> None:
        if not problem.quadratic:
            raise UnsupportedError(
                "the kernel solution is for quadratic losses: use RescaledSquareLoss, or "
                "fit_exact(method='cg')"
            )
        self.problem = problem
        logits, gradients, hessians = [], [], []
        for inputs, targets in problem.batches():
            found, _ = problem.jacobian.outputs(None, inputs)
            _, gradient = loss_gradient(problem.loss, found, targets)
            logits.append(found.flatten(1).double())
            gradients.append(len(found) * gradient.flatten(1).double())
            hessians.append(loss_hessians(problem.loss, found, targets).double())
        self.anchor_logits = torch.cat(logits)
        self.samples, self.outputs = self.anchor_logits.shape
        rows = self.samples * self.outputs
        if rows > MAX_ROWS:
            raise ArgumentError(
                f"data has {self.samples} samples of {self.outputs} outputs: the kernel would have "
                f"{rows:,} rows, {MAX_ROWS:,} are supported. Use fewer samples, or conjugate "
                "gradients"
            )
        self.factors, self.wanted = _squares(torch.cat(hessians), torch.cat(gradients))
        self.gram = self._gram()

    @property
    def whitened(self) -> Tensor:
        """LᵀKL, (N C, N C)."""
        n, c = self.samples, self.outputs
        half = torch.einsum("iab,iajd->ibjd", self.factors, self.gram.view(n, c, n, c))
        return torch.einsum("ibjd,jde->ibje", half, self.factors).reshape(n * c, n * c)

    def cross(self, inputs: Tensor) -> Tensor:
        """J(x) Jᵀ of other inputs, (M, C, N C)."""
        rows = torch.cat([self.problem.jacobian.rows(one[None]) for one in inputs])
        found = [products(rows, block) for _, block in self._blocks(1, "kernel of the inputs")]
        return torch.cat(found, dim=1).view(len(inputs), self.outputs, -1)

    def own(self, inputs: Tensor) -> Tensor:
        """J(x) J(x)ᵀ of each input, (M, C, C)."""
        rows = map(self.problem.jacobian.rows, inputs[:, None])
        return torch.stack([products(of_one, of_one) for of_one in rows])

    def pull_back(self, weights: Tensor) -> Tensor:
        """Jᵀ w of weights (N, C), flat as a delta."""
        start = 0

        def cotangent(primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int) -> Tensor:
            nonlocal start
            part = weights[start : start + len(primal)]
            start += len(primal)
            return part.view(primal.shape).to(primal.dtype)

        return self.problem.pull_back(self.problem.layout.zeros(), cotangent)

    def _gram(self) -> Tensor:
        size = self.samples * self.outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.problem.jacobian.device)
        layout = self.problem.layout
        held = max(1, MEMORY // (self.outputs * layout.size * layout.dtype.itemsize))
        for first, block in self._blocks(held, "kernel"):
            end = first + len(block)
            gram[first:end, first:end] = products(block, block)
            if end == size:
                break
            for start, others in self._blocks(8, "kernel", skip=end // self.outputs):
                gram[first:end, start : start + len(others)] = products(block, others)
        return torch.triu(gram) + torch.triu(gram, 1).T

    def _blocks(self, held: int, what: str, skip: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Rows of J for `held` samples at a time, from sample `skip` on, and the first's index."""
        bar = tqdm(
            total=self.samples - skip,
            desc=what,
            unit="sample",
            delay=2,
            leave=False,
            disable=not self.problem.progress,
        )
        number = 0
        rows: list[Tensor] = []
        with bar:
            for inputs, _ in self.problem.batches():
                for one in inputs:
                    number += 1
                    if number <= skip:
                        continue
                    rows.append(self.problem.jacobian.rows(one[None]))
                    bar.update()
                    if len(rows) == held or number == self.samples:
                        block = torch.cat(rows) if len(rows) > 1 else rows[0]
                        yield (number - len(rows)) * self.outputs, block
                        rows = []


def solve_dual(problem: Problem) -> Tensor:
    """The minimum of a quadratic problem by its kernel: Δ = Jᵀ L (LᵀKL + N l2 I)⁻¹ Lᵀ(y - f)."""
    kernel = TangentKernel(problem)
    matrix = kernel.whitened
    matrix.diagonal().add_(kernel.samples * problem.l2)
    solved = torch.cholesky_solve(kernel.wanted.reshape(-1, 1), torch.linalg.cholesky(matrix))
    weights = kernel.factors @ solved.view(kernel.samples, kernel.outputs, 1)
    return kernel.pull_back(weights.squeeze(2))


def products(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ in float64, from parts of the rows that are multiplied in their own precision."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_COLUMNS, dim=1), b.split(_COLUMNS, dim=1), strict=True):
        total += (left @ right.T).double()
    return total


def _squares(hessians: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """L with A = L Lᵀ, and -L⁺ g."""
    values, vectors = torch.linalg.eigh(hessians)
    largest = values.amax(dim=1, keepdim=True)
    tiny = 1e-5 * largest
    if (values < -tiny).any():
        raise ArgumentError("loss is not convex in the logits: its Hessian has a negative value")
    kept = values > tiny
    roots = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / roots.clamp_min(1e-300), 0.0)
    along = torch.einsum("nab,na->nb", vectors, gradients)
    endless = along.masked_fill(kept, 0.0).abs() > 1e-4 * gradients.abs().amax(dim=1, keepdim=True)
    if endless.any():
        raise UnsupportedError(
            "the loss falls without end along a direction in which it is not curved: the kernel "
            "solution needs a minimum in the logits. Use fit_exact(method='cg')"
        )
    return vectors * roots[:, None, :], -inverse * along
