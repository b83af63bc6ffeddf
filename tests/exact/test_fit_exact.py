"""fit_exact against the dense ridge solution, in float64."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, SAMPLES, Dense, make, softmax_hessians
from torch import Tensor
from torch.utils.data import TensorDataset

from tangent_ops import fit
from tangent_ops.errors import (
    ArgumentError,
    NonFiniteLossError,
    NotConvergedWarning,
    UnsupportedError,
)
from tangent_ops.exact import fit_exact
from tangent_ops.exact.passes import Passes
from tangent_ops.losses import RescaledSquareLoss


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("l2", [1.0, 1e-3])
@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 8}, {}, {"method": "dual"}], ids=str)
def test_agrees_with_the_dense_ridge_solution(dense: Dense, l2: float, options: dict) -> None:
    report = fit_exact(dense.problem(l2), tol=1e-11, **options)
    exact = dense.optimum(l2)
    assert relative(dense.delta, exact) <= 1e-10
    assert report.converged and report.samples == SAMPLES
    if options.get("method") == "dual":
        # The kernel's solution, not that of the iterations after it: alone they take 6 and 52.
        assert report.iterations <= (2 if l2 == 1.0 else 10)
    distance = float((dense.delta - exact).norm())
    assert distance <= report.distance_bound + 1e-12 * float(exact.norm())
    assert report.distance_bound == pytest.approx(report.gradient_norm / l2)


def test_the_oracle_is_ridge_regression(dense: Dense) -> None:
    residual = (dense.targets - dense.anchor).flatten()
    right = 2 / CLASSES * dense.jacobian.flatten(0, 1).T @ residual
    exact = torch.linalg.solve(dense.hessian(0.1), right)
    assert relative(dense.optimum(0.1), exact) <= 1e-12
    assert relative(dense.solve(right, SAMPLES * 0.1), exact) <= 1e-12


@pytest.mark.parametrize("method", ["cg", "dual"])
def test_other_quadratic_losses(dense: Dense, method: str) -> None:
    fit_exact(dense.problem(0.1, loss=RescaledSquareLoss(k=3.0)), tol=1e-11, method=method)
    assert relative(dense.delta, dense.optimum(0.1, k=3.0)) <= 1e-10


@pytest.mark.parametrize("method", ["cg", "dual"])
def test_a_loss_that_is_flat_along_a_direction(dense: Dense, method: str) -> None:
    """The loss depends on differences of logits only: its Hessian by the logits is singular."""

    def centred(logits: Tensor, targets: Tensor) -> Tensor:
        wanted = 15.0 * F.one_hot(targets, CLASSES)
        off = logits - wanted
        return (off - off.mean(dim=1, keepdim=True)).square().sum(dim=1).mean()

    fit_exact(dense.problem(0.1, loss=centred), tol=1e-10, method=method)
    centre = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
    rows = (centre @ dense.jacobian).flatten(0, 1)
    hessian = 2 * rows.T @ rows / SAMPLES
    hessian.diagonal().add_(0.1)
    wanted = ((dense.targets - dense.anchor) @ centre).flatten()
    exact = torch.linalg.solve(hessian, 2 * rows.T @ wanted / SAMPLES)
    assert relative(dense.delta, exact) <= 1e-9


def test_minimises_the_objective_of_fit(dense: Dense) -> None:
    report = fit_exact(dense.problem(0.5), tol=1e-10)
    best = dense.delta
    history = fit(
        dense.tangent, dense.data, lr=1e-9, l2=0.5, epochs=1, batch_size=SAMPLES, progress=False
    )
    assert history.loss[0] == pytest.approx(report.objective, rel=1e-12)
    assert relative(dense.delta, best) < 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_the_bound_holds_anywhere(dense: Dense, scale: float) -> None:
    noise = torch.randn(dense.delta.shape, generator=torch.Generator().manual_seed(0)).double()
    start = dense.optimum(0.1) + scale * noise
    _, gradient, _ = dense.problem(0.1).passes.gradient(start)
    distance = float((start - dense.optimum(0.1)).norm())
    assert distance <= float(gradient.norm()) / 0.1 + 1e-9
    assert scale == 0 or float(gradient.norm()) / 0.1 < 1e6 * distance  # the bound is not trivial


def test_cross_entropy_by_newton(dense: Dense) -> None:
    report = fit_exact(dense.problem(0.01, loss=F.cross_entropy), tol=1e-9)
    assert report.converged and report.newton_steps > 1
    # Independently: Newton's method with dense matrices, from elsewhere.
    x = torch.zeros_like(dense.delta)
    labels = dense.data.tensors[1]
    for _ in range(50):
        probability, blocks = softmax_hessians(dense.anchor + dense.jacobian @ x)
        residual = (probability - F.one_hot(labels, CLASSES)) / SAMPLES
        gradient = torch.einsum("nc,ncp->p", residual, dense.jacobian) + 0.01 * x
        if float(gradient.norm()) < 1e-12:
            break
        step = dense.solve(gradient, 0.01, blocks / SAMPLES)
        x -= min(1.0, 5.0 / float(step.norm())) * step
    assert float(gradient.norm()) < 1e-12
    assert relative(dense.delta, x) <= 1e-9


def test_a_warm_start_needs_fewer_iterations(dense: Dense) -> None:
    cold = fit_exact(dense.problem(0.01), tol=1e-8, rank=0)
    again = fit_exact(dense.problem(0.01), tol=1e-6, rank=0)
    assert again.iterations == 0 and again.converged
    dense.set(dense.optimum(0.01, keep=list(range(11))))
    warm = fit_exact(dense.problem(0.01), tol=1e-8, rank=0)
    assert 0 < warm.iterations < cold.iterations


def test_low_rank_deltas() -> None:
    low = make(rank=2)
    fit_exact(low.problem(0.1), tol=1e-10, method="dual")
    dual = low.delta
    low.set(torch.zeros_like(dual))
    fit_exact(low.problem(0.1), tol=1e-10)
    assert relative(low.delta, dual) <= 1e-9


class Interrupted(Exception):
    pass


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts calls of `Passes.products`; the one with the number `fatal` raises Interrupted."""
    count = SimpleNamespace(calls=0, fatal=0)
    product = Passes.products

    def counted(*args, **kwargs):
        count.calls += 1
        if count.calls == count.fatal:
            raise Interrupted
        return product(*args, **kwargs)

    monkeypatch.setattr(Passes, "products", counted)
    return count


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["square", "cross-entropy"])
def test_a_resumed_fit_is_the_same_bit_for_bit(
    dense: Dense, tmp_path, products: SimpleNamespace, loss
) -> None:
    path = tmp_path / "solve.safetensors"
    options = {"tol": 1e-7, "rank": 4, "checkpoint": path, "checkpoint_every": 2}
    problem = dense.problem(1e-3, loss=loss)
    whole = fit_exact(problem, **options)
    expected = dense.delta
    assert not path.exists() and whole.iterations > 13

    for at in (3, 9, 17, 26):
        dense.set(torch.zeros_like(expected))
        products.fatal = products.calls + at
        with pytest.raises(Interrupted):
            fit_exact(problem, **options)
        assert not dense.delta.any()
        # By passes, one call makes the preconditioner's four products.
        assert path.exists() == (at > 3 or dense.representation == "factors"), at
        rest = fit_exact(dense.problem(1e-3, loss=loss), **options)
        assert torch.equal(dense.delta, expected), at
        assert (rest.iterations, rest.newton_steps) == (whole.iterations, whole.newton_steps), at
        assert not path.exists()


def test_a_fit_that_rounding_ends_is_resumed(
    tmp_path, dense: Dense, products: SimpleNamespace
) -> None:
    single = dense.in_single()
    options = {"tol": 1e-12, "checkpoint": tmp_path / "solve", "checkpoint_every": 1, "rank": 0}
    with pytest.warns(NotConvergedWarning):
        whole = fit_exact(single.problem(0.1), **options)
    expected = single.delta
    single.set(torch.zeros_like(expected))
    products.calls, products.fatal = 0, products.calls  # the last one
    with pytest.raises(Interrupted):
        fit_exact(single.problem(0.1), **options)
    with pytest.warns(NotConvergedWarning):
        rest = fit_exact(single.problem(0.1), **options)
    assert (rest.iterations, rest.newton_steps) == (whole.iterations, whole.newton_steps)
    assert torch.equal(single.delta, expected)


def test_a_checkpoint_of_something_else_is_refused(
    dense: Dense, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "solve.safetensors"
    removed: list[object] = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, **_: removed.append(self))
    options = {"checkpoint": path, "checkpoint_every": 1, "rank": 0}
    fit_exact(dense.problem(0.1), **options)
    monkeypatch.undo()
    assert path.exists() and removed
    dense.set(torch.zeros_like(dense.delta))
    with pytest.raises(ArgumentError, match=r"another problem \(l2 differ\)"):
        fit_exact(dense.problem(0.2), **options)
    with pytest.raises(ArgumentError, match=r"\(data differ\)"):
        fit_exact(dense.problem(0.1, dense.without(0)), **options)
    with pytest.raises(ArgumentError, match=r"\(loss differ\)"):
        fit_exact(dense.problem(0.1, loss=RescaledSquareLoss(k=2)), **options)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="is damaged"):
        fit_exact(dense.problem(0.1), **options)
    path.write_bytes(content[:100])
    with pytest.raises(ArgumentError, match="is damaged"):
        fit_exact(dense.problem(0.1), **options)
    assert not dense.delta.any()


def test_spent_iterations_are_told(dense: Dense) -> None:
    with pytest.warns(NotConvergedWarning, match="after 2 iterations"):
        report = fit_exact(dense.problem(1e-3), max_iterations=2, rank=0)
    assert not report.converged and report.iterations == 2
    assert dense.delta.any()


def test_single_precision_ends_by_itself(dense: Dense) -> None:
    single = dense.in_single()
    with pytest.warns(NotConvergedWarning):
        report = fit_exact(single.problem(0.1), tol=1e-12)
    assert report.iterations < 300  # rounding ended it, not max_iterations
    assert relative(single.delta.double(), dense.optimum(0.1)) <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_exact(single.problem(0.1), tol=1e-2).converged


def test_refusals(dense: Dense) -> None:
    whole = dense.problem(0.1)

    def refused(match: str, *, error=ArgumentError, problem=whole, **options) -> None:
        with pytest.raises(error, match=match):
            fit_exact(problem, **options)
        assert not dense.delta.any()

    refused("tol must be between 0 and 1, got 0", tol=0)
    refused("method must be one of", method="qr")
    refused("rank must be an integer", rank=-1)
    refused("max_iterations must be", max_iterations=0)
    entropy = dense.problem(0.1, loss=F.cross_entropy)
    refused("for quadratic losses", error=UnsupportedError, method="dual", problem=entropy)
    refused("checkpoint is for method='cg'", method="dual", checkpoint="x")
    refused("checkpoint=/nowhere/x: it is in a folder that does not exist", checkpoint="/nowhere/x")
    refused("problem must be a Problem, got a Linearized", problem=dense.tangent)
    inputs, classes = dense.data.tensors
    broken = TensorDataset(inputs.clone().index_fill(0, torch.tensor([7]), math.nan), classes)
    for method in ("auto", "cg", "dual"):
        problem = dense.problem(0.1, broken)
        refused("not finite", error=NonFiniteLossError, problem=problem, method=method)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["cg", "dual"])
def test_on_a_gpu(method: str) -> None:
    dense = make()
    fit_exact(dense.problem(0.1, device="cuda"), tol=1e-11, method=method)
    assert relative(dense.delta.cpu(), dense.optimum(0.1)) <= 1e-9


def test_the_anchor_and_other_state_stay(dense: Dense) -> None:
    before = {name: value.clone() for name, value in dense.tangent.anchor.state_dict().items()}
    fit_exact(dense.problem(0.1))
    after = dense.tangent.anchor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(delta.grad is None for delta in dense.tangent.deltas().values())
