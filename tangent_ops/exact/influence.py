"""`Influence`: exact leave-one-out predictions for all samples, without training again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError
from tangent_ops.exact.problem import Problem, check_l2, check_problem
from tangent_ops.exact.tangent_kernel import TangentKernel, decomposed


class Influence:
    """Exact leave-one-out predictions of a quadratic fit, from the tangent kernel J Jᵀ.

    "Without sample i" is `fit_exact` on the other samples with the same l2. In sums over samples,
    that fit's penalty has the weight (N - 1) l2, and that of the fit on all samples N l2. With
    M = (LᵀKL + (N - 1) l2 I)⁻¹, K = J Jᵀ, L of `TangentKernel`, ỹ = Lᵀ(y - f):

        f₋ᵢ(x) - f(x0) = J(x) Jᵀ L (M ỹ - M_·ᵢ M_ᵢᵢ⁻¹ (M ỹ)ᵢ)

    which is the residual of the full fit times the inverse of (I - h_ii), all C outputs at once
    (Cook, Weisberg, "Residuals and Influence in Regression", 1982, section 2.2, for C = 1). J Jᵀ
    costs two small Gram products a layer from layer factors, and C N² P products by passes, once;
    M costs (N C)³ operations for each weight of the penalty.

    Args:
        problem: model, data, loss and penalty: a quadratic loss, and at most 20,000 samples times
            outputs. The model's deltas are not used: all fits are computed from the data.

    Raises:
        ArgumentError: a single sample; too many samples times outputs.
        UnsupportedError: the loss is not quadratic.
    """

    def __init__(self, problem: Problem) -> None:
        check_problem(problem)
        if problem.samples == 1:
            raise ArgumentError("data has a single sample: nothing is left without it")
        self._l2 = problem.l2
        self._problem = problem
        self._kernel = TangentKernel(problem.system)

    @property
    def l2(self) -> float:
        """The penalty's weight in the fits that are compared; at first the problem's."""
        return self._l2

    @l2.setter
    def l2(self, value: float) -> None:
        check_l2(value)
        self._l2 = float(value)

    def left_out(self) -> Tensor:
        """(N, C): the logits of each sample from the fit without that sample."""
        return self._left_out(self.l2)

    def cross_validate(self, l2s: Iterable[float]) -> list[CrossValidation]:
        """Leave-one-out cross-validation for each weight of the penalty, without a fit.

        Raises:
            ArgumentError: a weight is not positive.
        """
        weights = list(l2s)
        for weight in weights:
            check_l2(weight)
        return [self._validation(weight) for weight in weights]

    def change(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """f₋ᵢ(x) - f(x): the change of each input's logits when each sample is left out.

        Args:
            inputs: (M, ...), a batch; or a dict of fields, as the data's.

        Returns:
            (N, M, C): float64.
        """
        kernel = self._kernel
        across = kernel.cross(self._problem.present(inputs))  # (M, C, N C)
        return torch.stack([across @ weights for weights in self._weight_changes()])

    def classical(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """`change` by the classical influence function, without the factor (I - h_ii)⁻¹.

        For comparison: it is not exact (Koh, Liang: "Understanding Black-box Predictions via
        Influence Functions", ICML 2017, section 2.2, for removing one sample).

        Returns:
            (N, M, C): float64.
        """
        kernel = self._kernel
        n, c = kernel.samples, kernel.outputs
        across = self._whitened(kernel.cross(self._problem.present(inputs)))
        inverse = self._inverse(n * self.l2)
        moved = (across @ inverse).view(*across.shape[:2], n, c)
        # The residual ỹ - LᵀKL M ỹ is N l2 M ỹ.
        residual = n * self.l2 * (inverse @ kernel.wanted.reshape(-1)).view(n, c)
        return -torch.einsum("mcie,ie->imc", moved, residual)

    def loss_change(self, inputs: Tensor | Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """(N, M): the change of each input's loss when each sample is left out.

        Positive: the loss is higher without the sample, so the sample helped.
        """
        problem, kernel = self._problem, self._kernel
        entering = problem.present(inputs)
        anchored, _ = problem.system.jacobian.outputs(None, entering)
        targets = targets.to(anchored.device)
        across = kernel.cross(entering)
        full = anchored.flatten(1).double() + across @ self._weights(kernel.samples * self.l2)
        changed = full + torch.stack([across @ weights for weights in self._weight_changes()])

        def each(logits: Tensor) -> Tensor:
            shaped = logits.view(anchored.shape).to(anchored.dtype)
            pairs = zip(shaped[:, None], targets[:, None], strict=True)
            return torch.stack([problem.loss(one, target).double() for one, target in pairs])

        before = each(full)
        return torch.stack([each(after) - before for after in changed])

    def covariance(
        self, inputs: Tensor | Mapping[str, Tensor], noise_variance: float = 1.0
    ) -> Tensor:
        """As `predictive_covariance`, from the tangent kernel: (M, C, C) in float64.

        By Woodbury's identity, σ² / (N l2) (J(x) J(x)ᵀ - k M kᵀ) with k = J(x) Jᵀ L.
        """
        kernel = self._kernel
        penalty = kernel.samples * self.l2
        entering = self._problem.present(inputs)
        across = self._whitened(kernel.cross(entering))
        explained = across @ self._inverse(penalty) @ across.transpose(1, 2)
        return noise_variance / penalty * (kernel.own(entering) - explained)

    def _validation(self, l2: float) -> CrossValidation:
        problem, left_out = self._problem, self._left_out(l2)
        total, start, correct = 0.0, 0, 0
        for inputs, targets in problem.passes.batches():
            logits = left_out[start : start + len(inputs)]  # (n, C)
            start += len(inputs)
            total += len(inputs) * float(problem.loss(logits, targets))
            if targets.shape == logits.shape[:1] and not targets.is_floating_point():
                correct += int((logits.argmax(dim=1) == targets).sum())
            else:
                correct = -1
        n = problem.samples
        return CrossValidation(l2, total / n, correct / n if correct >= 0 else None)

    def _left_out(self, l2: float) -> Tensor:
        kernel = self._kernel
        n, c = kernel.samples, kernel.outputs
        inverse = self._inverse((n - 1) * l2)
        solved = inverse @ kernel.wanted.reshape(-1)
        gram = kernel.gram.view(n, c, n * c)
        found = [
            gram[i] @ self._spread(solved - without)
            for i, without in enumerate(self._withouts(inverse, solved))
        ]
        return kernel.anchor_logits + torch.stack(found)

    def _weight_changes(self) -> Iterator[Tensor]:
        """For each sample left out, the change of w in Δ = Jᵀ w, (N C,)."""
        kernel = self._kernel
        full = self._weights(kernel.samples * self.l2)
        inverse = self._inverse((kernel.samples - 1) * self.l2)
        solved = inverse @ kernel.wanted.reshape(-1)
        for without in self._withouts(inverse, solved):
            yield self._spread(solved - without) - full

    def _withouts(self, inverse: Tensor, solved: Tensor) -> Iterator[Tensor]:
        """M_·ᵢ M_ᵢᵢ⁻¹ (M ỹ)ᵢ for each sample."""
        c = self._kernel.outputs
        for i in range(self._kernel.samples):
            own = slice(i * c, i * c + c)
            yield inverse[:, own] @ torch.linalg.solve(inverse[own, own], solved[own])

    def _weights(self, penalty: float) -> Tensor:
        """w of the fit on all samples; the penalty's weight is in sums over samples."""
        return self._spread(self._inverse(penalty) @ self._kernel.wanted.reshape(-1))

    def _spread(self, solved: Tensor) -> Tensor:
        kernel = self._kernel
        parts = solved.view(kernel.samples, kernel.outputs, 1)
        return (kernel.factors @ parts).reshape(-1)

    def _whitened(self, across: Tensor) -> Tensor:
        """k L of k = J(x) Jᵀ, (M, C, N C)."""
        shape = (*across.shape[:2], self._kernel.samples, self._kernel.outputs)
        return torch.einsum("mcid,ide->mcie", across.view(shape), self._kernel.factors).flatten(2)

    def _inverse(self, penalty: float) -> Tensor:
        matrix = self._kernel.whitened
        matrix.diagonal().add_(penalty)
        return torch.cholesky_inverse(decomposed(matrix, self.l2))


@dataclass(frozen=True)
class CrossValidation:
    """Leave-one-out cross-validation of one weight of the penalty.

    Attributes:
        l2: the weight.
        loss: mean over the samples of a sample's loss, by the fit without that sample.
        accuracy: fraction of samples that the fit without them classifies correctly; None if the
            targets are not classes.
    """

    l2: float
    loss: float
    accuracy: float | None
