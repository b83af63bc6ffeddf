"""`Problem`: what it computes once, what it never keeps, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, SAMPLES, SIZE, Dense, flat, make
from refusals import refused
from small_models import images, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, CertificateError, UnsupportedError
from tangent_ops.exact import (
    Influence,
    Problem,
    add_samples,
    certify,
    first_order_scores,
    fit_exact,
    forget_samples,
    leave_one_out,
    predictive_covariance,
)
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import Trunk

L2 = 0.05
STAY, GO = list(range(9)), [9, 10, 11]


@pytest.fixture(scope="module", params=["passes", "factors"])
def shared(request: pytest.FixtureRequest) -> Dense:
    """The problem with the last norm and the head trainable."""
    return replace(make(trainable=r"^(norm|head)\."), representation=request.param)


@pytest.fixture
def through_trunk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples in each call of a trunk."""
    seen: list[int] = []
    forward = Trunk.forward

    def counted(self: Trunk, *args: Tensor) -> Tensor:
        seen.append(len(args[0]))
        return forward(self, *args)

    monkeypatch.setattr(Trunk, "forward", counted)
    return seen


def close(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).norm()) <= 1e-9 * float(exact.norm())


@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_frozen_part_runs_once(dense: Dense, through_trunk: list[int], where, tmp_path) -> None:
    problem = dense.problem(L2, cache=True if where == "memory" else tmp_path)
    assert problem.cached and sum(through_trunk) == SAMPLES
    fit_exact(problem, tol=1e-11)
    assert close(dense.delta, dense.optimum(L2))
    certify(problem)
    Influence(problem).cross_validate([L2, 1.0])
    fit_exact(problem.with_l2(1.0))
    fit_exact(problem, tol=1e-11)
    problem.curvature()({name: torch.ones_like(d) for name, d in dense.tangent.deltas().items()})
    delta, certificate = forget_samples(problem, GO, tol=1e-11)
    assert close(flat(delta), dense.optimum(L2, keep=STAY))
    certificate.verify()
    assert sum(through_trunk) == SAMPLES
    fit_exact(problem, tol=1e-11)
    inputs, targets = images(2, seed=9).double(), torch.tensor([1, 2])
    leave_one_out(problem, [0, 5], inputs)
    first_order_scores(problem, inputs, targets)
    predictive_covariance(problem, inputs)
    assert sum(through_trunk) == SAMPLES + 3 * len(inputs)  # other inputs, and no sample again


@pytest.mark.parametrize("cache", [False, True])
def test_only_new_samples_are_computed(dense: Dense, through_trunk: list[int], cache) -> None:
    dense.set(dense.optimum(L2, keep=STAY))
    problem = dense.problem(L2, dense.kept(*STAY), cache=cache)
    delta, certificate = add_samples(problem, dense.kept(*GO), tol=1e-11)
    assert close(flat(delta), dense.optimum(L2))
    assert sum(through_trunk) == (SAMPLES if cache else 0)
    assert certificate.samples == SAMPLES
    assert certificate.data == dense.problem(L2).data_sha256
    whole = problem.plus(dense.kept(*GO))
    assert whole.without(STAY).data_sha256 == dense.problem(L2, dense.kept(*GO)).data_sha256


@pytest.mark.parametrize("cache", [False, True])
def test_nothing_of_the_deltas_is_kept(dense: Dense, cache: bool) -> None:
    """After a change of the deltas, every answer is that of a new problem."""
    inputs, targets = images(2, seed=9).double(), torch.tensor([1, 2])
    problem = dense.problem(L2, cache=cache)

    def answers(problem: Problem) -> list[Tensor]:
        return [
            torch.tensor(certify(problem).distance_bound),
            predictive_covariance(problem, inputs),  # its noise is the mean loss
            first_order_scores(problem, inputs, targets),
            leave_one_out(problem, [3], inputs),
        ]

    fit_exact(problem, tol=1e-9)
    stale = answers(problem)
    dense.set(1.001 * dense.delta)
    found = answers(problem)
    torch.testing.assert_close(found, answers(dense.problem(L2, cache=cache)))
    assert not any(torch.equal(*pair) for pair in zip(found, stale, strict=True))
    fit_exact(problem, tol=1e-11)  # from there
    assert close(dense.delta, dense.optimum(L2))


def test_it_says_what_it_is_and_stays_so(dense: Dense) -> None:
    problem = dense.problem(L2, cache=True)
    lines = repr(problem).splitlines()
    assert len(lines) <= 12
    for line in ("samples: 12", "outputs: 5", f"parameters: {len(dense.delta)}", "l2: 0.05"):
        assert f"  {line}" in lines
    assert "loss: RescaledSquareLoss(k=1, M=15, reduction='mean'), quadratic" in repr(problem)
    assert "cached: yes" in repr(problem)
    with pytest.raises(FrozenInstanceError):
        problem.tangent = dense.tangent  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        problem.l2 = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert problem.with_l2(1.0).l2 == 1.0 and problem.l2 == L2
    loader = DataLoader(dense.data, batch_size=7)
    assert problem.data_sha256 == dense.problem(1.0, loader).data_sha256
    assert problem.data_sha256 != dense.problem(L2, dense.without(0)).data_sha256


def test_a_changed_model_or_data_are_noticed() -> None:
    dense = make(trainable=r"^(norm|head)\.")
    problem, plain = dense.problem(L2, cache=True), dense.problem(L2)
    certificate = certify(problem)
    dense.data.tensors[0][3] += 1
    refused(CertificateError, "another data", certificate.verify)
    assert certify(problem).data == certificate.data  # still about what was cached
    with torch.no_grad():
        state = {name: value + 0.1 for name, value in dense.tangent.state_dict().items()}
    dense.tangent.load_state_dict(state)
    for method in (fit_exact, certify, Influence, lambda p: p.curvature()({})):
        refused(ArgumentError, "moved, cast or loaded", method, problem)
    certify(plain)  # keeps nothing of the model
    dense.tangent.float()
    refused(ArgumentError, "moved, cast or loaded", fit_exact, plain)


def test_ids_out_of_range(dense: Dense) -> None:
    problem = dense.problem(L2)
    for ids, match in (
        ([12], "id 12 is out of range: data has 12 samples, 0 to 11"),
        ([-1], "each id must be an integer of at least 0, got -1"),
        ([1.0], "each id must be an integer"),
        ([], "ids is empty"),
        (range(12), "nothing is left"),
    ):
        refused(ArgumentError, match, forget_samples, problem, ids)
        refused(ArgumentError, match, problem.without, ids)
    assert not dense.delta.any()
    refused(ArgumentError, "got a DataLoader", add_samples, problem, DataLoader(dense.data))
    refused(ArgumentError, "l2 must be positive", problem.with_l2, 0)


class Noisy(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 16, 16).double(), index % CLASSES


class Stream(IterableDataset):
    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        raise AssertionError("it was read")


WEIGHTS = torch.tensor([1.0, 2, 3, 4, 5]).double()
NO_MEAN = "mean of the samples' own losses"


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("l2 must be positive and finite, got 0", {"l2": 0}),
        ("l2 must be positive", {"l2": math.inf}),
        ("differ between two readings", {"data": Noisy()}),
        ("data is empty", {"data": Subset(Noisy(), [])}),
        ("must be a Dataset with indices", {"data": Stream()}),
        ("data must be a DataLoader or a Dataset", {"data": [1]}),
        (NO_MEAN, {"loss": RescaledSquareLoss(reduction="sum")}),
        (NO_MEAN, {"loss": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS)}),
        ("must return a scalar", {"loss": RescaledSquareLoss(reduction="none")}),
        ("must be convex", {"loss": lambda z, y: -z.square().mean()}),
        ("loss must be a function of logits and targets, got a str", {"loss": "rsl"}),
        ("batch_size must be an integer", {"batch_size": 0}),
    ],
)
def test_refused_before_any_work(
    dense: Dense, through_trunk: list[int], match: str, options: dict[str, Any]
) -> None:
    refused(ArgumentError, match, dense.problem, **{"l2": L2, "cache": True, **options})
    assert not through_trunk


def test_what_cannot_be_cached_or_is_no_tangent_model(dense: Dense) -> None:
    with pytest.raises(UnsupportedError, match="no part of the model is frozen"):
        Problem(linearize(vit(**SIZE)), dense.in_single().data, L2, cache=True)
    with pytest.raises(ArgumentError, match="tangent must be a LinearizedModel, got a Vision"):
        Problem(dense.tangent.anchor, dense.data, L2)


def negative(logits: Tensor, targets: Tensor) -> Tensor:
    signs = torch.tensor([1.0, -0.1, 1, 1, 1]).to(logits)
    return (signs[targets] * RescaledSquareLoss(reduction="none")(logits, targets)).mean()


def late_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Square loss for one class, cross-entropy for the others."""
    squares = RescaledSquareLoss(reduction="none")(logits, targets)
    entropies = F.cross_entropy(logits, targets, reduction="none")
    return torch.where(targets == 0, squares, entropies).mean()


def test_a_folder_that_is_sorted_by_class(dense: Dense) -> None:
    """The losses differ by class, and the first batch has one class only."""
    inputs, classes = images(10).double(), torch.arange(2).repeat_interleave(5)
    data = TensorDataset(inputs, classes)
    losses = {
        nn.CrossEntropyLoss(WEIGHTS): NO_MEAN,
        nn.CrossEntropyLoss(ignore_index=1): NO_MEAN,
        negative: "must be convex",
    }
    for loss, match in losses.items():
        refused(ArgumentError, match, dense.problem, L2, data, loss=loss)
    assert not dense.problem(L2, data, loss=late_entropy).quadratic
    unknown = TensorDataset(inputs, classes.clone().index_fill(0, torch.tensor([9]), -100))
    problem = dense.problem(L2, unknown, loss=F.cross_entropy)
    for first_pass in (fit_exact, certify):
        refused(ArgumentError, "leave out samples whose target it ignores", first_pass, problem)
    known = dense.problem(L2, data, loss=F.cross_entropy)
    certify(known)  # its own targets are tried; new ones still have to be
    refused(ArgumentError, "leave out samples whose target it ignores", add_samples, known, unknown)
    assert not dense.delta.any()


def test_a_class_weight_on_a_head_of_zeros() -> None:
    """With zero logits every class has the same loss, so class weights do not show in it."""
    model = vit(**SIZE).double()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    data = TensorDataset(images(6).double(), torch.arange(6) % CLASSES)
    with pytest.raises(ArgumentError, match=NO_MEAN):
        Problem(linearize(model, r"^head"), data, L2, loss=nn.CrossEntropyLoss(WEIGHTS))


def test_a_shuffling_loader_is_read_in_order(dense: Dense) -> None:
    loader = DataLoader(dense.data, batch_size=5, shuffle=True, drop_last=True)
    state = torch.random.get_rng_state()
    for cache in (False, True):
        dense.set(torch.zeros_like(dense.delta))
        report = fit_exact(dense.problem(L2, loader, cache=cache), tol=1e-11)
        assert report.samples == SAMPLES
        assert close(dense.delta, dense.optimum(L2))
    assert torch.equal(torch.random.get_rng_state(), state)
