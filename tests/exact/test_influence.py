"""Leave-one-out against actual retraining, and predictive uncertainty against dense algebra."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, QUIET, SAMPLES, Dense, make
from small_models import images
from torch import Tensor

from tangent_ops.errors import ArgumentError, ConvergenceError, UnsupportedError
from tangent_ops.exact import (
    Influence,
    first_order_scores,
    fit_exact,
    leave_one_out,
    predictive_covariance,
)
from tangent_ops.exact import tangent_kernel as kernel_module
from tangent_ops.losses import RescaledSquareLoss

L2 = 0.05
INPUTS = images(3, seed=9).double()
TARGETS = torch.tensor([1, 2, 3])
EACH = RescaledSquareLoss(reduction="none")


@pytest.fixture(scope="module")
def dense() -> Dense:
    """At the optimum of all samples."""
    made = make()
    made.set(made.optimum(L2))
    return made


@pytest.fixture(scope="module")
def influence(dense: Dense) -> Influence:
    return Influence(dense.tangent, dense.data, L2, **QUIET)


@pytest.fixture(scope="module")
def retrained(dense: Dense) -> Tensor:
    """(N, P): optima without each sample, by fit_exact itself."""
    found = []
    for i in range(SAMPLES):
        fit_exact(dense.tangent, dense.without(i), L2, tol=1e-12, **QUIET)
        found.append(dense.delta)
    dense.set(dense.optimum(L2))
    return torch.stack(found)


@pytest.fixture(scope="module")
def truth(dense: Dense, retrained: Tensor) -> Tensor:
    """(N, M, C): what retraining without each sample does to the logits of INPUTS."""
    return torch.einsum("mcp,np->nmc", dense.rows(INPUTS), retrained - dense.optimum(L2))


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def test_exact_influence_is_retraining_and_the_classical_is_not(
    influence: Influence, truth: Tensor
) -> None:
    assert worst(influence.change(INPUTS), truth) <= 1e-6
    assert worst(influence.classical(INPUTS), truth) > 0.1


def test_the_classical_one_is_what_it_says(dense: Dense, influence: Influence) -> None:
    inverse = dense.hessian(L2).inverse()
    residual = dense.targets - dense.anchor - dense.jacobian @ dense.optimum(L2)
    pulled = torch.einsum("ncp,nc->np", dense.jacobian, 2 / CLASSES * residual)
    expected = -torch.einsum("mcp,pq,nq->nmc", dense.rows(INPUTS), inverse, pulled)
    torch.testing.assert_close(influence.classical(INPUTS), expected)


def test_left_out_predictions(dense: Dense, influence: Influence, retrained: Tensor) -> None:
    expected = dense.anchor + torch.einsum("ncp,np->nc", dense.jacobian, retrained)
    torch.testing.assert_close(influence.left_out(), expected, rtol=1e-6, atol=1e-6)


def test_loss_changes(dense: Dense, influence: Influence, truth: Tensor) -> None:
    before = dense.tangent(INPUTS).detach()
    expected = torch.stack([EACH(before + row, TARGETS) - EACH(before, TARGETS) for row in truth])
    found = influence.loss_change(INPUTS, TARGETS)
    assert worst(found, expected) <= 1e-6
    assert (found > 0).any() and (found < 0).any()


def test_cross_validation_without_refits(dense: Dense, influence: Influence) -> None:
    weights = [1e-3, 0.05, 2.0]
    found = influence.cross_validate(weights)
    for weight, row in zip(weights, found, strict=True):
        logits = []
        for i in range(SAMPLES):
            optimum = dense.optimum(weight, keep=[j for j in range(SAMPLES) if j != i])
            logits.append(dense.anchor[i] + dense.jacobian[i] @ optimum)
        logits, labels = torch.stack(logits), dense.data.tensors[1]
        assert row.l2 == weight
        assert row.loss == pytest.approx(float(EACH(logits, labels).mean()), rel=1e-6)
        assert row.accuracy == float((logits.argmax(1) == labels).double().mean())
    with pytest.raises(ArgumentError, match="l2 must be positive"):
        influence.cross_validate([0.0])


def test_other_weights_of_the_target(dense: Dense) -> None:
    loss = RescaledSquareLoss(k=4.0)
    found = Influence(dense.tangent, dense.data, L2, loss=loss, **QUIET).change(INPUTS)
    rest = [j for j in range(SAMPLES) if j != 5]
    step = dense.optimum(L2, k=4.0, keep=rest) - dense.optimum(L2, k=4.0)
    assert worst(found[5], dense.rows(INPUTS) @ step) <= 1e-6


def test_rows_that_do_not_fit_into_memory(
    dense: Dense, influence: Influence, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = CLASSES * dense.jacobian.shape[2] * 8
    monkeypatch.setattr(kernel_module, "MEMORY", 5 * row)  # 5, 5 and 2 samples
    monkeypatch.setattr(kernel_module, "_COLUMNS", 1000)
    parts = Influence(dense.tangent, dense.data, L2, **QUIET)
    torch.testing.assert_close(parts.change(INPUTS), influence.change(INPUTS))


def test_without_a_kernel_matrix(dense: Dense, truth: Tensor) -> None:
    few = [0, 7, 11]
    found = leave_one_out(dense.tangent, dense.data, L2, few, INPUTS, tol=1e-9, **QUIET)
    assert worst(found, truth[few]) <= 1e-6


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["square", "cross-entropy"])
def test_first_order_scores(dense: Dense, loss) -> None:
    """The derivative of the loss by the weight that a sample has, by finite differences."""
    each = EACH if loss is None else lambda z, y: F.cross_entropy(z, y, reduction="none")
    mean = loss or RescaledSquareLoss()
    fit_exact(dense.tangent, dense.data, L2, tol=1e-12, loss=loss, **QUIET)
    found = first_order_scores(
        dense.tangent, dense.data, L2, INPUTS, TARGETS, loss=loss, tol=1e-10, **QUIET
    )
    rows, labels, best = dense.rows(INPUTS), dense.data.tensors[1], dense.delta
    anchor = dense.tangent.primal_and_tangent(INPUTS)[0].detach()

    def optimum(weight: float) -> Tensor:
        """By dense Newton steps, with that weight for sample 4 and its share of the penalty."""
        weights = torch.ones(SAMPLES, dtype=torch.float64)
        weights[4] = weight
        x = best.clone().requires_grad_()
        for _ in range(4):
            logits = dense.anchor + dense.jacobian @ x
            total = (weights * each(logits, labels)).sum()
            total = total + L2 * weights.sum() / 2 * x.square().sum()
            (gradient,) = torch.autograd.grad(total, x)
            blocks = torch.stack(
                [
                    torch.func.hessian(lambda z, y=y: mean(z[None], y[None]))(z)
                    for z, y in zip(logits.detach(), labels, strict=True)
                ]
            )
            weighted = blocks * weights[:, None, None]
            hessian = torch.einsum("ncp,ncd,ndq->pq", dense.jacobian, weighted, dense.jacobian)
            hessian.diagonal().add_(L2 * weights.sum())
            x = (x - torch.linalg.solve(hessian, gradient)).detach().requires_grad_()
        return x.detach()

    step = 1e-4
    before, after = (each(anchor + rows @ optimum(w), TARGETS) for w in (1 + step, 1 - step))
    expected = (after - before) / (2 * step)
    assert worst(found[4], expected) <= 1e-5
    dense.set(dense.optimum(L2))


def test_uncertainty_is_the_posterior(dense: Dense, influence: Influence) -> None:
    rows = dense.rows(INPUTS)
    exact = rows @ torch.linalg.solve(dense.hessian(L2), rows.transpose(1, 2))
    found = predictive_covariance(
        dense.tangent, dense.data, L2, INPUTS, noise_variance=3.0, tol=1e-10, **QUIET
    )
    torch.testing.assert_close(found, 3.0 * exact)
    torch.testing.assert_close(influence.covariance(INPUTS, 3.0), 3.0 * exact)
    residual = dense.targets - dense.anchor - dense.jacobian @ dense.optimum(L2)
    variance = float((2 / CLASSES * residual.square()).mean())
    found = predictive_covariance(dense.tangent, dense.data, L2, INPUTS[:1], tol=1e-10, **QUIET)
    torch.testing.assert_close(found, variance * exact[:1])


def test_uncertainty_of_a_classifier(dense: Dense) -> None:
    found = predictive_covariance(
        dense.tangent, dense.data, L2, INPUTS[:1], loss=F.cross_entropy, tol=1e-10, **QUIET
    )
    probability = (dense.anchor + dense.jacobian @ dense.optimum(L2)).softmax(dim=1)
    blocks = torch.diag_embed(probability) - probability[:, :, None] * probability[:, None]
    hessian = torch.einsum("ncp,ncd,ndq->pq", dense.jacobian, blocks, dense.jacobian)
    hessian.diagonal().add_(SAMPLES * L2)
    rows = dense.rows(INPUTS[:1])[0]
    torch.testing.assert_close(found[0], rows @ torch.linalg.solve(hessian, rows.T))


def test_refusals(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="for quadratic losses"):
        Influence(dense.tangent, dense.data, L2, loss=F.cross_entropy, **QUIET)
    with pytest.raises(UnsupportedError, match="needs a quadratic loss"):
        leave_one_out(dense.tangent, dense.data, L2, [0], INPUTS, loss=F.cross_entropy, **QUIET)
    for off in (torch.zeros_like(dense.delta), 1.5 * dense.optimum(L2)):
        dense.set(off)
        with pytest.raises(ArgumentError, match="from the optimum for these data"):
            leave_one_out(dense.tangent, dense.data, L2, [0], INPUTS, **QUIET)
        with pytest.raises(ArgumentError, match="from the optimum for these data"):
            first_order_scores(dense.tangent, dense.data, L2, INPUTS, TARGETS, **QUIET)
    dense.set(dense.optimum(L2))
    with pytest.raises(ArgumentError, match="index 12: data has 12 samples"):
        leave_one_out(dense.tangent, dense.data, L2, [12], INPUTS, **QUIET)
    with pytest.raises(ArgumentError, match="a single sample"):
        leave_one_out(dense.tangent, dense.kept(0), L2, [0], INPUTS, **QUIET)
    with pytest.raises(ConvergenceError, match="did not reach tol"):
        leave_one_out(dense.tangent, dense.data, L2, [0], INPUTS, max_iterations=1, rank=0, **QUIET)
    with pytest.raises(ArgumentError, match="noise_variance must be positive"):
        predictive_covariance(dense.tangent, dense.data, L2, INPUTS, -1.0, **QUIET)
    with pytest.raises(ConvergenceError, match="did not reach tol"):
        predictive_covariance(
            dense.tangent, dense.data, L2, INPUTS, max_iterations=1, rank=0, **QUIET
        )
    with pytest.raises(ArgumentError, match="a single sample"):
        Influence(dense.tangent, dense.kept(0), L2, **QUIET)
    monkeypatch.setattr(kernel_module, "MAX_ROWS", 59)
    with pytest.raises(ArgumentError, match="60 rows, 59 are supported"):
        Influence(dense.tangent, dense.data, L2, **QUIET)
