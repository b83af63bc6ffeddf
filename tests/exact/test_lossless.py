"""Lossless composition against the fit on the union."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from dense import Dense, flat, make
from refusals import refused

from tangent_ops import compose, linearize, save_delta
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, ConvergenceError, DeltaError, UnsupportedError
from tangent_ops.exact import Problem, ShardCurvature, compose_lossless, fit_exact
from tangent_ops.losses import RescaledSquareLoss

L2 = 0.05
PARTS = [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11]]  # unequal, and of unequal classes


@pytest.fixture(scope="module")
def dense(shared: Dense) -> Dense:
    return shared


@pytest.fixture(scope="module")
def deltas(dense: Dense) -> list[Delta]:
    found = []
    for part in PARTS:
        dense.set(torch.zeros_like(dense.delta))
        fit_exact(dense.problem(L2, dense.kept(*part)), tol=1e-12)
        found.append(dense.tangent.delta_dict())
    return found


@pytest.fixture(scope="module")
def curvatures(dense: Dense) -> list[ShardCurvature]:
    return [dense.problem(L2, dense.kept(*part)).curvature() for part in PARTS]


def test_it_is_the_fit_on_the_union(dense: Dense, deltas, curvatures, tmp_path) -> None:
    exact = dense.optimum(L2)
    paths = []
    for number, delta in enumerate(deltas):
        paths.append(tmp_path / f"{number}.safetensors")
        save_delta(delta, paths[-1])
    found = compose_lossless(paths, curvatures, tol=1e-12, progress=False)
    dense.tangent.load_delta_dict(found)  # a file has its own order of names
    assert float((dense.delta - exact).norm()) <= 1e-9 * float(exact.norm())
    assert found.meta == compose(deltas).meta
    # The mean is not.
    assert float((flat(compose(deltas)) - exact).norm()) > 0.1 * float(exact.norm())


def test_products_are_with_the_shards_hessian(dense: Dense, curvatures) -> None:
    direction = {n: torch.randn_like(d) for n, d in dense.tangent.deltas().items()}
    for part, curvature in zip(PARTS, curvatures, strict=True):
        expected = dense.hessian(L2, keep=part) @ flat(direction)
        torch.testing.assert_close(flat(curvature(direction)), expected)
        assert curvature.samples == len(part)


def test_dropping_a_shard_is_composing_the_others(dense: Dense, deltas, curvatures) -> None:
    found = compose_lossless(deltas[1:], curvatures[1:], tol=1e-12, progress=False)
    exact = dense.optimum(L2, keep=PARTS[1] + PARTS[2])
    assert float((flat(found) - exact).norm()) <= 1e-9 * float(exact.norm())


def test_products_from_another_process(dense: Dense, deltas, curvatures) -> None:
    """Only a child process has the last shard's data; products come through a pipe."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_serve, args=(theirs, curvatures[2]))
    child.start()

    def remote(direction):
        ours.send({name: value.numpy() for name, value in direction.items()})
        return {name: torch.from_numpy(value) for name, value in ours.recv().items()}

    try:
        found = compose_lossless(deltas, [*curvatures[:2], remote], tol=1e-10, progress=False)
    finally:
        ours.send(None)
        child.join()
    exact = dense.optimum(L2)
    assert float((flat(found) - exact).norm()) <= 1e-7 * float(exact.norm())


def _serve(pipe, curvature: ShardCurvature) -> None:
    while (direction := pipe.recv()) is not None:
        product = curvature({name: torch.from_numpy(value) for name, value in direction.items()})
        pipe.send({name: value.numpy() for name, value in product.items()})


def test_refusals(dense: Dense, deltas, curvatures) -> None:
    refused(ArgumentError, "2 curvatures for 3 deltas", compose_lossless, deltas, curvatures[:2])
    other = dense.problem(2 * L2, dense.kept(*PARTS[2])).curvature()
    refused(ArgumentError, "several l2", compose_lossless, deltas, [*curvatures[:2], other])
    weighted = RescaledSquareLoss(k=2.0)
    other = dense.problem(L2, dense.kept(*PARTS[2]), loss=weighted).curvature()
    refused(ArgumentError, "several loss", compose_lossless, deltas, [*curvatures[:2], other])
    elsewhere = make().tangent.anchor
    with torch.no_grad():
        elsewhere.get_parameter("head.bias").add_(1)
    other = Problem(linearize(elsewhere), dense.kept(*PARTS[2]), L2, progress=False).curvature()
    refused(DeltaError, "another anchor", compose_lossless, deltas, [*curvatures[:2], other])
    refused(ArgumentError, "tol must be", compose_lossless, deltas, curvatures, tol=0)
    with pytest.raises(UnsupportedError, match="needs a quadratic loss"):
        dense.problem(L2, loss=F.cross_entropy).curvature()
    with pytest.raises(ConvergenceError, match="after 1 iterations"):
        plain = [lambda v, shard=shard: shard(v) for shard in curvatures]  # no preconditioner
        compose_lossless(deltas, plain, tol=1e-9, max_iterations=1, progress=False)
    with pytest.raises(DeltaError, match="the product of shard 1 does not fit"):
        compose_lossless(deltas, [curvatures[0], lambda v: {"x": torch.ones(1)}, curvatures[2]])


def test_it_gives_the_best_after_some_rounds(dense: Dense, deltas) -> None:
    """With a bound that holds; one product is for the right side, one for the start's residual."""
    exact = dense.optimum(L2)
    curvatures = [dense.problem(L2, dense.kept(*part)).curvature() for part in PARTS]
    calls = 0

    def counted(curvature: ShardCurvature):
        def product(direction):
            nonlocal calls
            calls += 1
            return curvature(direction)

        return product

    mean = float((flat(compose(deltas)) - exact).norm())
    for rounds in (3, 4, 6):
        calls = 0
        far = [counted(curvatures[0]), *curvatures[1:]]
        found = compose_lossless(deltas, far, 1e-14, max_rounds=rounds, progress=False)
        assert calls == found.rounds == rounds and found.distance_bound is None
        assert not found.converged and float((flat(found) - exact).norm()) <= mean
    for rounds in (3, 4):
        found = compose_lossless(deltas, curvatures, 1e-14, max_rounds=rounds, progress=False)
        distance = float((flat(found) - exact).norm())
        assert found.distance_bound is not None
        assert distance <= found.distance_bound + 1e-11 and found.distance_bound <= 1e3 * mean
    with pytest.raises(ArgumentError, match="max_rounds must be an integer of at least 3"):
        compose_lossless(deltas, curvatures, max_rounds=2)


def test_samples_of_all_shards_give_the_preconditioner(dense: Dense, deltas) -> None:
    """As factors, all samples of these shards: one iteration, and one for rounding."""
    parts = [dense.problem(L2, dense.kept(*p), representation="factors") for p in PARTS]
    curvatures = [part.curvature() for part in parts]
    found = compose_lossless(deltas, curvatures, tol=1e-10, progress=False)
    assert found.converged and found.rounds <= 5
    assert float((flat(found) - dense.optimum(L2)).norm()) <= 1e-9 * float(dense.optimum(L2).norm())
