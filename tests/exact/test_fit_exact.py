"""fit_exact against the dense ridge solution, in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, QUIET, SAMPLES, Dense, make
from small_models import images, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tangent_ops import fit, linearize
from tangent_ops.errors import (
    ArgumentError,
    NonFiniteLossError,
    NotConvergedWarning,
    UnsupportedError,
)
from tangent_ops.exact import certify, fit_exact
from tangent_ops.exact.problem import Problem
from tangent_ops.losses import RescaledSquareLoss


@pytest.fixture(scope="module")
def shared() -> Dense:
    return make()


@pytest.fixture
def dense(shared: Dense) -> Dense:
    shared.set(torch.zeros_like(shared.delta))
    return shared


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("l2", [1.0, 1e-3])
@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 8}, {}, {"method": "dual"}], ids=str)
def test_agrees_with_the_dense_ridge_solution(dense: Dense, l2: float, options: dict) -> None:
    report = fit_exact(dense.tangent, dense.data, l2, tol=1e-11, **options, **QUIET)
    exact = dense.optimum(l2)
    assert relative(dense.delta, exact) <= 1e-10
    assert report.converged and report.samples == SAMPLES
    if options.get("method") == "dual":
        assert report.iterations <= 3  # the kernel's solution, not that of the iterations after it
    distance = float((dense.delta - exact).norm())
    assert distance <= report.distance_bound + 1e-12 * float(exact.norm())
    assert report.distance_bound == pytest.approx(report.gradient_norm / l2)


def test_the_oracle_is_ridge_regression(dense: Dense) -> None:
    residual = (dense.targets - dense.anchor).flatten()
    right = 2 / CLASSES * dense.jacobian.flatten(0, 1).T @ residual
    exact = torch.linalg.solve(dense.hessian(0.1), right)
    assert relative(dense.optimum(0.1), exact) <= 1e-12


@pytest.mark.parametrize("method", ["cg", "dual"])
def test_other_quadratic_losses(dense: Dense, method: str) -> None:
    fit_exact(
        dense.tangent,
        dense.data,
        0.1,
        tol=1e-11,
        loss=RescaledSquareLoss(k=3.0),
        method=method,
        **QUIET,
    )
    assert relative(dense.delta, dense.optimum(0.1, k=3.0)) <= 1e-10


@pytest.mark.parametrize("method", ["cg", "dual"])
def test_a_loss_that_is_flat_along_a_direction(dense: Dense, method: str) -> None:
    """Differences of logits alone count: the Hessian by the logits is singular."""

    def centred(logits: Tensor, targets: Tensor) -> Tensor:
        wanted = 15.0 * F.one_hot(targets, CLASSES)
        off = logits - wanted
        return (off - off.mean(dim=1, keepdim=True)).square().sum(dim=1).mean()

    fit_exact(dense.tangent, dense.data, 0.1, tol=1e-10, loss=centred, method=method, **QUIET)
    centre = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
    rows = (centre @ dense.jacobian).flatten(0, 1)
    hessian = 2 * rows.T @ rows / SAMPLES
    hessian.diagonal().add_(0.1)
    wanted = ((dense.targets - dense.anchor) @ centre).flatten()
    exact = torch.linalg.solve(hessian, 2 * rows.T @ wanted / SAMPLES)
    assert relative(dense.delta, exact) <= 1e-9


def test_minimises_the_objective_of_fit(dense: Dense) -> None:
    report = fit_exact(dense.tangent, dense.data, 0.5, tol=1e-10, **QUIET)
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
    problem = Problem(dense.tangent, dense.data, 0.1)
    _, gradient, _ = problem.gradient(start)
    distance = float((start - dense.optimum(0.1)).norm())
    assert distance <= float(gradient.norm()) / 0.1 + 1e-9
    assert scale == 0 or float(gradient.norm()) / 0.1 < 1e6 * distance  # it says something


def test_cross_entropy_by_newton(dense: Dense) -> None:
    report = fit_exact(dense.tangent, dense.data, 0.01, tol=1e-9, loss=F.cross_entropy, **QUIET)
    assert report.converged and report.newton_steps > 1
    # Independently: Newton's method with dense matrices, from elsewhere.
    x = torch.zeros_like(dense.delta)
    labels = dense.data.tensors[1]
    for _ in range(50):
        probability = (dense.anchor + dense.jacobian @ x).softmax(dim=1)
        residual = (probability - F.one_hot(labels, CLASSES)) / SAMPLES
        gradient = torch.einsum("nc,ncp->p", residual, dense.jacobian) + 0.01 * x
        blocks = torch.diag_embed(probability) - probability[:, :, None] * probability[:, None]
        hessian = torch.einsum("ncp,ncd,ndq->pq", dense.jacobian, blocks / SAMPLES, dense.jacobian)
        hessian.diagonal().add_(0.01)
        if float(gradient.norm()) < 1e-12:
            break
        step = torch.linalg.solve(hessian, gradient)
        x -= min(1.0, 5.0 / float(step.norm())) * step
    assert float(gradient.norm()) < 1e-12
    assert relative(dense.delta, x) <= 1e-9


def test_a_warm_start_needs_fewer_iterations(dense: Dense) -> None:
    cold = fit_exact(dense.tangent, dense.data, 0.01, tol=1e-8, rank=0, **QUIET)
    again = fit_exact(dense.tangent, dense.data, 0.01, tol=1e-6, rank=0, **QUIET)
    assert again.iterations == 0 and again.converged
    dense.set(dense.optimum(0.01, keep=list(range(11))))
    warm = fit_exact(dense.tangent, dense.data, 0.01, tol=1e-8, rank=0, **QUIET)
    assert 0 < warm.iterations < cold.iterations


def test_low_rank_deltas_and_cached_features() -> None:
    low = make(rank=2)
    fit_exact(low.tangent, low.data, 0.1, tol=1e-10, method="dual", **QUIET)
    dual = low.delta
    low.set(torch.zeros_like(dual))
    fit_exact(low.tangent, low.data, 0.1, tol=1e-10, **QUIET)
    assert relative(low.delta, dual) <= 1e-9

    last = make(trainable=r"^(norm|head)\.")
    fit_exact(last.tangent, last.data, 0.1, tol=1e-11, cache=True, **QUIET)
    assert relative(last.delta, last.optimum(0.1)) <= 1e-10


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["square", "cross-entropy"])
@pytest.mark.parametrize("at", [3, 9, 17, 26])
def test_a_resumed_fit_is_the_same_bit_for_bit(
    dense: Dense, tmp_path, monkeypatch: pytest.MonkeyPatch, loss, at: int
) -> None:
    path = tmp_path / "solve.safetensors"
    options = {"tol": 1e-7, "loss": loss, "rank": 4, "checkpoint": path, "checkpoint_every": 2}
    whole = fit_exact(dense.tangent, dense.data, 1e-3, **options, **QUIET)
    expected = dense.delta
    assert not path.exists() and whole.iterations > 13

    dense.set(torch.zeros_like(expected))
    calls = 0
    product = Problem.product

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Interrupted
        return product(*args, **kwargs)

    monkeypatch.setattr(Problem, "product", interrupted)
    with pytest.raises(Interrupted):
        fit_exact(dense.tangent, dense.data, 1e-3, **options, **QUIET)
    assert not dense.delta.any()
    assert path.exists() == (at > 7)  # four products make the preconditioner
    monkeypatch.undo()
    rest = fit_exact(dense.tangent, dense.data, 1e-3, **options, **QUIET)
    assert torch.equal(dense.delta, expected)
    assert (rest.iterations, rest.newton_steps) == (whole.iterations, whole.newton_steps)
    assert not path.exists()


def test_a_fit_that_rounding_ends_is_resumed(
    tmp_path, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    tangent = linearize(vit(depth=1, embed_dim=12, num_heads=2))
    data = TensorDataset(dense.data.tensors[0].float(), dense.data.tensors[1])
    options = {"tol": 1e-12, "checkpoint": tmp_path / "solve", "checkpoint_every": 1, "rank": 0}
    product, calls, last = Problem.product, 0, 10**9

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == last:
            raise Interrupted
        return product(*args, **kwargs)

    monkeypatch.setattr(Problem, "product", counted)
    with pytest.warns(NotConvergedWarning):
        whole = fit_exact(tangent, data, 0.1, **options, **QUIET)
    expected = {name: value.clone() for name, value in tangent.deltas().items()}
    for delta in tangent.deltas().values():
        delta.data.zero_()
    calls, last = 0, calls
    with pytest.raises(Interrupted):
        fit_exact(tangent, data, 0.1, **options, **QUIET)
    with pytest.warns(NotConvergedWarning):
        rest = fit_exact(tangent, data, 0.1, **options, **QUIET)
    assert (rest.iterations, rest.newton_steps) == (whole.iterations, whole.newton_steps)
    assert all(torch.equal(value, expected[name]) for name, value in tangent.deltas().items())


def test_a_checkpoint_of_something_else_is_refused(
    dense: Dense, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "solve.safetensors"
    removed: list[object] = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, **_: removed.append(self))
    options = {"checkpoint": path, "checkpoint_every": 1, "rank": 0}
    fit_exact(dense.tangent, dense.data, 0.1, **options, **QUIET)
    monkeypatch.undo()
    assert path.exists() and removed
    dense.set(torch.zeros_like(dense.delta))
    with pytest.raises(ArgumentError, match=r"another problem \(l2 differ\)"):
        fit_exact(dense.tangent, dense.data, 0.2, **options, **QUIET)
    with pytest.raises(ArgumentError, match=r"\(data differ\)"):
        fit_exact(dense.tangent, dense.without(0), 0.1, **options, **QUIET)
    with pytest.raises(ArgumentError, match=r"\(loss differ\)"):
        fit_exact(dense.tangent, dense.data, 0.1, loss=RescaledSquareLoss(k=2), **options, **QUIET)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="is damaged"):
        fit_exact(dense.tangent, dense.data, 0.1, **options, **QUIET)
    path.write_bytes(content[:100])
    with pytest.raises(ArgumentError, match="is damaged"):
        fit_exact(dense.tangent, dense.data, 0.1, **options, **QUIET)
    assert not dense.delta.any()


def test_spent_iterations_are_told(dense: Dense) -> None:
    with pytest.warns(NotConvergedWarning, match="after 2 iterations"):
        report = fit_exact(dense.tangent, dense.data, 1e-3, max_iterations=2, rank=0, **QUIET)
    assert not report.converged and report.iterations == 2
    assert dense.delta.any()


def test_single_precision_ends_by_itself() -> None:
    model = vit(depth=1, embed_dim=12, num_heads=2)
    tangent = linearize(model)
    exact = make()
    data = TensorDataset(exact.data.tensors[0].float(), exact.data.tensors[1])
    with pytest.warns(NotConvergedWarning):
        report = fit_exact(tangent, data, 0.1, tol=1e-12, **QUIET)
    assert report.iterations < 300  # rounding ended it, not max_iterations
    found = torch.cat([value.detach().flatten() for value in tangent.deltas().values()])
    assert relative(found.double(), exact.optimum(0.1)) <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_exact(tangent, data, 0.1, tol=1e-2, **QUIET).converged


class Noisy(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 16, 16).double(), index % CLASSES


def test_refusals(dense: Dense) -> None:
    data = dense.data

    def refused(match: str, *, error=ArgumentError, data=data, l2=0.1, **options) -> None:
        with pytest.raises(error, match=match):
            fit_exact(dense.tangent, data, l2, **options, **QUIET)
        assert not dense.delta.any()

    refused("l2 must be positive and finite, got 0", l2=0)
    refused("l2 must be positive", l2=math.inf)
    refused("tol must be between 0 and 1, got 0", tol=0)
    refused("method must be one of", method="qr")
    refused("rank must be an integer", rank=-1)
    refused("max_iterations must be", max_iterations=0)
    refused("differ between two readings", data=Noisy())
    refused("mean of the samples' own losses", loss=RescaledSquareLoss(reduction="sum"))
    weights = torch.tensor([1.0, 2, 3, 4, 5]).double()
    refused(
        "mean of the samples' own losses", loss=lambda z, y: F.cross_entropy(z, y, weight=weights)
    )
    refused("must return a scalar", loss=RescaledSquareLoss(reduction="none"))
    refused("must be convex", loss=lambda z, y: -z.square().mean())
    refused("for quadratic losses", error=UnsupportedError, method="dual", loss=F.cross_entropy)
    refused("checkpoint is for method='cg'", method="dual", checkpoint="x")
    refused("is in a folder that does not exist", checkpoint="/nowhere/x")
    broken = TensorDataset(data.tensors[0].clone(), data.tensors[1])
    broken.tensors[0][7] = math.nan
    refused("not finite", error=NonFiniteLossError, data=broken)
    with pytest.raises(ArgumentError, match="tangent must be a LinearizedModel, got a Vision"):
        fit_exact(dense.tangent.anchor, data, 0.1)


def negative(logits: Tensor, targets: Tensor) -> Tensor:
    signs = torch.tensor([1.0, -0.1, 1, 1, 1]).to(logits)
    return (signs[targets] * RescaledSquareLoss(reduction="none")(logits, targets)).mean()


def late_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Square loss for one class, cross-entropy for the others."""
    squares = RescaledSquareLoss(reduction="none")(logits, targets)
    entropies = F.cross_entropy(logits, targets, reduction="none")
    return torch.where(targets == 0, squares, entropies).mean()


@pytest.mark.parametrize("take", [fit_exact, certify])
def test_a_folder_that_is_sorted_by_class(dense: Dense, take) -> None:
    """What a loss does with the class of the first samples says nothing about the others."""
    inputs, classes = images(10).double(), torch.arange(2).repeat_interleave(5)
    data = TensorDataset(inputs, classes)
    weights = torch.tensor([1.0, 2, 3, 4, 5]).double()
    losses = {
        nn.CrossEntropyLoss(weights): "mean of the samples' own losses",
        nn.CrossEntropyLoss(ignore_index=1): "mean of the samples' own losses",
        negative: "must be convex",
    }
    for loss, match in losses.items():
        with pytest.raises(ArgumentError, match=match):
            take(dense.tangent, data, 0.1, loss=loss, **QUIET)
    unknown = TensorDataset(inputs, classes.clone().index_fill(0, torch.tensor([9]), -100))
    with pytest.raises(ArgumentError, match="leave out samples whose target it ignores"):
        take(dense.tangent, unknown, 0.1, loss=F.cross_entropy, **QUIET)
    assert not dense.delta.any()
    assert not Problem(dense.tangent, data, 0.1, late_entropy).quadratic


def test_a_class_weight_on_a_head_of_zeros() -> None:
    """Its logits are zero: every class has the same loss, whatever the weights."""
    model = vit(depth=1, embed_dim=12, num_heads=2).double()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    data = TensorDataset(images(6).double(), torch.arange(6) % CLASSES)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4, 5]).double())
    with pytest.raises(ArgumentError, match="mean of the samples' own losses"):
        fit_exact(linearize(model, r"^head"), data, 0.1, loss=loss, **QUIET)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["cg", "dual"])
def test_on_a_gpu(method: str) -> None:
    dense = make()
    fit_exact(dense.tangent, dense.data, 0.1, tol=1e-11, method=method, device="cuda", **QUIET)
    assert relative(dense.delta.cpu(), dense.optimum(0.1)) <= 1e-9


def test_a_shuffling_loader_is_read_in_order(dense: Dense) -> None:
    loader = DataLoader(dense.data, batch_size=5, shuffle=True, drop_last=True)
    state = torch.random.get_rng_state()
    report = fit_exact(dense.tangent, loader, 0.1, tol=1e-11, progress=False)
    assert report.samples == SAMPLES
    assert relative(dense.delta, dense.optimum(0.1)) <= 1e-10
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_anchor_and_other_state_stay(dense: Dense) -> None:
    before = {name: value.clone() for name, value in dense.tangent.anchor.state_dict().items()}
    fit_exact(dense.tangent, dense.data, 0.1, **QUIET)
    after = dense.tangent.anchor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(delta.grad is None for delta in dense.tangent.deltas().values())
