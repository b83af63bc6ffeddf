"""Leave-one-out against retraining, and predictive uncertainty against dense algebra."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, SAMPLES, Dense, softmax_hessians
from refusals import refused
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
def dense(shared: Dense) -> Dense:
    """The problem with its deltas at the optimum of all samples."""
    shared.set(shared.optimum(L2))
    return shared


@pytest.fixture(scope="module")
def influence(dense: Dense) -> Influence:
    return Influence(dense.problem(L2))


@pytest.fixture(scope="module")
def retrained(dense: Dense) -> Tensor:
    """(N, P): optima without each sample, by fit_exact itself."""
    found = []
    for i in range(SAMPLES):
        fit_exact(dense.problem(L2, dense.without(i)), tol=1e-12)
        found.append(dense.delta)
    dense.set(dense.optimum(L2))
    return torch.stack(found)


@pytest.fixture(scope="module")
def truth(dense: Dense, retrained: Tensor) -> Tensor:
    """(N, M, C): the change of INPUTS' logits by retraining without each sample."""
    return torch.einsum("mcp,np->nmc", dense.rows(INPUTS), retrained - dense.optimum(L2))


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def test_exact_influence_is_retraining_and_the_classical_is_not(
    influence: Influence, truth: Tensor
) -> None:
    assert worst(influence.change(INPUTS), truth) <= 1e-6
    assert worst(influence.classical(INPUTS), truth) > 0.1


def test_the_classical_one_is_what_it_says(dense: Dense, influence: Influence) -> None:
    residual = dense.targets - dense.anchor - dense.jacobian @ dense.optimum(L2)
    pulled = torch.einsum("ncp,nc->np", dense.jacobian, 2 / CLASSES * residual)
    moved = dense.solve(pulled.T, SAMPLES * L2)
    expected = -torch.einsum("mcp,pn->nmc", dense.rows(INPUTS), moved)
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
    refused(ArgumentError, "l2 must be positive", influence.cross_validate, [0.0])


def test_other_weights_of_the_target(dense: Dense) -> None:
    loss = RescaledSquareLoss(k=4.0)
    found = Influence(dense.problem(L2, loss=loss)).change(INPUTS)
    rest = [j for j in range(SAMPLES) if j != 5]
    step = dense.optimum(L2, k=4.0, keep=rest) - dense.optimum(L2, k=4.0)
    assert worst(found[5], dense.rows(INPUTS) @ step) <= 1e-6


def test_rows_that_do_not_fit_into_memory(
    dense: Dense, influence: Influence, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = CLASSES * dense.jacobian.shape[2] * 8
    monkeypatch.setattr(kernel_module, "MEMORY", 5 * row)  # 5, 5 and 2 samples
    monkeypatch.setattr(kernel_module, "_COLUMNS", 1000)
    parts = Influence(dense.problem(L2))
    torch.testing.assert_close(parts.change(INPUTS), influence.change(INPUTS))


def test_without_a_kernel_matrix(dense: Dense, truth: Tensor) -> None:
    few = [0, 7, 11]
    found = leave_one_out(dense.problem(L2), few, INPUTS, tol=1e-9)
    assert worst(found, truth[few]) <= 1e-6


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["square", "cross-entropy"])
def test_first_order_scores(dense: Dense, loss) -> None:
    """Against finite differences of the loss by the weight of sample 4."""
    each = EACH if loss is None else lambda z, y: F.cross_entropy(z, y, reduction="none")
    mean = loss or RescaledSquareLoss()
    fit_exact(dense.problem(L2, loss=loss), tol=1e-12)
    found = first_order_scores(dense.problem(L2, loss=loss), INPUTS, TARGETS, tol=1e-10)
    rows, labels, best = dense.rows(INPUTS), dense.data.tensors[1], dense.delta
    anchor = dense.tangent.primal_and_tangent(INPUTS)[0].detach()

    def optimum(weight: float) -> Tensor:
        """By dense Newton steps, with that weight for sample 4 and its share of the penalty."""
        weights = torch.ones(SAMPLES, dtype=torch.float64)
        weights[4] = weight
        weight_sum = float(weights.sum())
        x = best.clone().requires_grad_()
        for _ in range(4):
            logits = dense.anchor + dense.jacobian @ x
            total = (weights * each(logits, labels)).sum()
            total = total + L2 * weight_sum / 2 * x.square().sum()
            (gradient,) = torch.autograd.grad(total, x)
            blocks = torch.stack(
                [
                    torch.func.hessian(lambda z, y=y: mean(z[None], y[None]))(z)
                    for z, y in zip(logits.detach(), labels, strict=True)
                ]
            )
            step = dense.solve(gradient, L2 * weight_sum, blocks * weights[:, None, None])
            x = (x - step).detach().requires_grad_()
        return x.detach()

    step = 1e-4
    before, after = (each(anchor + rows @ optimum(w), TARGETS) for w in (1 + step, 1 - step))
    expected = (after - before) / (2 * step)
    assert worst(found[4], expected) <= 1e-5
    dense.set(dense.optimum(L2))


def test_uncertainty_is_the_posterior(dense: Dense, influence: Influence) -> None:
    rows = dense.rows(INPUTS)
    exact = torch.stack([one @ dense.solve(one.T, SAMPLES * L2) for one in rows])
    found = predictive_covariance(dense.problem(L2), INPUTS, noise_variance=3.0, tol=1e-10)
    torch.testing.assert_close(found, 3.0 * exact)
    torch.testing.assert_close(influence.covariance(INPUTS, 3.0), 3.0 * exact)
    residual = dense.targets - dense.anchor - dense.jacobian @ dense.optimum(L2)
    variance = float((2 / CLASSES * residual.square()).mean())
    found = predictive_covariance(dense.problem(L2), INPUTS[:1], tol=1e-10)
    torch.testing.assert_close(found, variance * exact[:1])


def test_uncertainty_of_a_classifier(dense: Dense) -> None:
    found = predictive_covariance(dense.problem(L2, loss=F.cross_entropy), INPUTS[:1], tol=1e-10)
    _, blocks = softmax_hessians(dense.anchor + dense.jacobian @ dense.optimum(L2))
    rows = dense.rows(INPUTS[:1])[0]
    torch.testing.assert_close(found[0], rows @ dense.solve(rows.T, SAMPLES * L2, blocks))


def test_refusals(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="for quadratic losses"):
        Influence(dense.problem(L2, loss=F.cross_entropy))
    with pytest.raises(UnsupportedError, match="needs a quadratic loss"):
        leave_one_out(dense.problem(L2, loss=F.cross_entropy), [0], INPUTS)
    for off in (torch.zeros_like(dense.delta), 1.5 * dense.optimum(L2)):
        dense.set(off)
        with pytest.raises(ArgumentError, match="from the optimum for these data"):
            leave_one_out(dense.problem(L2), [0], INPUTS)
        with pytest.raises(ArgumentError, match="from the optimum for these data"):
            first_order_scores(dense.problem(L2), INPUTS, TARGETS)
    dense.set(dense.optimum(L2))
    with pytest.raises(ArgumentError, match="id 12 is out of range: data has 12 samples"):
        leave_one_out(dense.problem(L2), [12], INPUTS)
    with pytest.raises(ArgumentError, match="nothing is left without them"):
        leave_one_out(dense.problem(L2, dense.kept(0)), [0], INPUTS)
    with pytest.raises(ConvergenceError, match="did not reach tol"):
        leave_one_out(dense.problem(L2), [0], INPUTS, max_iterations=1, rank=0)
    with pytest.raises(ArgumentError, match="noise_variance must be positive"):
        predictive_covariance(dense.problem(L2), INPUTS, -1.0)
    with pytest.raises(ConvergenceError, match="did not reach tol"):
        predictive_covariance(dense.problem(L2), INPUTS, max_iterations=1, rank=0)
    refused(ArgumentError, "a single sample", Influence, dense.problem(L2, dense.kept(0)))
    monkeypatch.setattr(kernel_module, "MAX_ROWS", 59)
    refused(ArgumentError, "60 rows, 59 are supported", Influence, dense.problem(L2))
