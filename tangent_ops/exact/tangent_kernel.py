"""`TangentKernel`: the tangent kernel J Jᵀ of a data set, and ridge regression with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.stored import Stored, StoredJacobian
from tangent_ops.losses import loss_gradient, loss_hessians

MAX_ROWS = 20_000  # N C: the matrix has 3.2 GB, and a decomposition takes minutes
MEMORY = 2 << 30  # bytes of rows of J that are held at a time
_COLUMNS = 1 << 16  # of J per product; the products are summed in float64


class TangentKernel:
    """K = J Jᵀ, (N C, N C) in float64, and the residuals that ridge regression fits.

    Rows and columns are the outputs of all samples; those of sample i are i C to i C + C - 1.
    A sample's loss is ½ ‖Lᵀ(f - y)‖² up to a constant: any quadratic loss has this form.

    Args:
        passes: over the data, in order.

    Attributes:
        gram: K.
        factors: (N, C, C): L, with A = L Lᵀ the Hessian of the sample's loss by its logits.
        wanted: (N, C): Lᵀ(y - f(x)), the regression's targets for Lᵀ J Δ.
        anchor_logits: (N, C): f(x).

    Raises:
        ArgumentError: more than `MAX_ROWS` rows.
        UnsupportedError: the loss is not quadratic, or has no minimum in the logits.
    """

    def __init__(self, passes: Passes) -> None:
        if not passes.quadratic:
            raise UnsupportedError(
                "the tangent kernel is for quadratic losses: use RescaledSquareLoss, or "
                "fit_exact(method='cg')"
            )
        self.passes = passes
        self.samples, self.outputs = passes.samples, passes.outputs
        rows = self.samples * self.outputs
        if rows > MAX_ROWS:
            raise ArgumentError(
                f"data has {self.samples} samples of {self.outputs} outputs: the tangent kernel "
                f"would have {rows:,} rows, {MAX_ROWS:,} are supported. Use fewer samples, or "
                "conjugate gradients"
            )
        logits, gradients, hessians = [], [], []
        for inputs, targets in passes.batches():
            found, _ = passes.jacobian.outputs(None, inputs)
            _, gradient = loss_gradient(passes.loss, found, targets)
            logits.append(found.flatten(1).double())
            gradients.append(len(found) * gradient.flatten(1).double())
            hessians.append(loss_hessians(passes.loss, found, targets).double())
        self.anchor_logits = torch.cat(logits)
        self.factors, self.wanted = _squares(torch.cat(hessians), torch.cat(gradients))
        self.gram = self._gram()

    @property
    def whitened(self) -> Tensor:
        """LᵀKL, (N C, N C)."""
        n, c = self.samples, self.outputs
        half = torch.einsum("iab,iajd->ibjd", self.factors, self.gram.view(n, c, n, c))
        return torch.einsum("ibjd,jde->ibje", half, self.factors).reshape(n * c, n * c)

    def cross(self, inputs: Stored | Tensor) -> Tensor:
        """J(x) Jᵀ for other inputs x, (M, C, N C)."""
        if isinstance(inputs, Stored):
            found = [inputs.gram(some) for some, _ in self.passes.batches()]
        else:
            rows = torch.cat([self.passes.jacobian.rows(one) for one in inputs.split(1)])
            found = [products(rows, block) for _, block in self._blocks(1, "kernel of the inputs")]
        return torch.cat(found, dim=1).view(len(inputs), self.outputs, -1)

    def own(self, inputs: Stored | Tensor) -> Tensor:
        """J(x) J(x)ᵀ of each input, (M, C, C)."""
        if isinstance(inputs, Stored):
            return inputs.own()
        rows = map(self.passes.jacobian.rows, inputs.split(1))
        return torch.stack([products(of_one, of_one) for of_one in rows])

    def pull_back(self, weights: Tensor) -> Tensor:
        """Jᵀ w of weights (N, C), flat as a delta."""
        start = 0

        def cotangent(primal: Tensor, tangent: Tensor, /, targets: Tensor, number: int) -> Tensor:
            nonlocal start
            part = weights[start : start + len(primal)]
            start += len(primal)
            return part.view(primal.shape).to(primal.dtype)

        return self.passes.pull_back(self.passes.layout.zeros(), cotangent)

    def _gram(self) -> Tensor:
        stored = isinstance(self.passes.jacobian, StoredJacobian)
        return self._gram_of_factors() if stored else self._gram_of_rows()

    def _gram_of_factors(self) -> Tensor:
        size = self.samples * self.outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.passes.jacobian.device)
        first = 0
        with self._bar("gram", self.samples) as bar:
            for some, _ in self.passes.batches():
                end = first + some.logits.numel()
                start = 0
                for others, _ in self.passes.batches():
                    stop = start + others.logits.numel()
                    if stop > end:
                        break
                    block = some.gram(others)
                    gram[first:end, start:stop] = block
                    gram[start:stop, first:end] = block.T
                    start = stop
                first = end
                bar.update(len(some))
        return gram

    def _gram_of_rows(self) -> Tensor:
        size = self.samples * self.outputs
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.passes.jacobian.device)
        layout = self.passes.layout
        held = max(1, MEMORY // (self.outputs * layout.size * layout.dtype.itemsize))
        for first, block in self._blocks(held, "kernel"):
            end = first + len(block)
            gram[first:end, first:end] = products(block, block)
            if end == size:
                break
            for start, others in self._blocks(8, "kernel", skip=end // self.outputs):
                gram[first:end, start : start + len(others)] = products(block, others)
        return torch.triu(gram) + torch.triu(gram, 1).T

    def _bar(self, what: str, total: int) -> tqdm:
        hidden = not self.passes.progress
        return tqdm(total=total, desc=what, unit="sample", delay=2, leave=False, disable=hidden)

    def _blocks(self, held: int, what: str, skip: int = 0) -> Iterator[tuple[int, Tensor]]:
        """First row's index, and rows of J, of `held` samples at a time, from sample `skip` on."""
        bar = self._bar(what, self.samples - skip)
        number = 0
        rows: list[Tensor] = []
        with bar:
            for inputs, _ in self.passes.batches():
                for one in inputs:
                    number += 1
                    if number <= skip:
                        continue
                    rows.append(self.passes.jacobian.rows(one[None]))
                    bar.update()
                    if len(rows) == held or number == self.samples:
                        block = torch.cat(rows) if len(rows) > 1 else rows[0]
                        yield (number - len(rows)) * self.outputs, block
                        rows = []


def solve_dual(passes: Passes) -> Tensor:
    """The minimum of a quadratic problem: Δ = Jᵀ L (LᵀKL + N l2 I)⁻¹ Lᵀ(y - f)."""
    kernel = TangentKernel(passes)
    matrix = kernel.whitened
    matrix.diagonal().add_(kernel.samples * passes.l2)
    solved = torch.cholesky_solve(kernel.wanted.reshape(-1, 1), decomposed(matrix, passes.l2))
    weights = kernel.factors @ solved.view(kernel.samples, kernel.outputs, 1)
    return kernel.pull_back(weights.squeeze(2))


def decomposed(matrix: Tensor, l2: float) -> Tensor:
    """The Cholesky factor of J Jᵀ with the penalty on its diagonal.

    Raises:
        NonFiniteLossError: an entry is NaN or infinite.
        ArgumentError: rounding of J Jᵀ exceeds the penalty.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed and not matrix.isfinite().all():
        raise NonFiniteLossError(
            "J Jᵀ is not finite: check the inputs for NaN, and a 16-bit model for overflow"
        )
    if failed:
        raise ArgumentError(
            f"l2={l2:g} is too small for the rounding of J Jᵀ: use a larger one, "
            "fit_exact(method='cg'), or a model in float64"
        )
    return factor


def products(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ as a float64 sum; parts of the rows are multiplied in their own precision."""
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
            "the loss is unbounded below along a direction without curvature: the tangent kernel "
            "needs a loss with a minimum in the logits. Use fit_exact(method='cg')"
        )
    return vectors * roots[:, None, :], -inverse * along
