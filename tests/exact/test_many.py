"""Several right-hand sides at a time: products and solves against dense matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, SAMPLES, Dense, softmax_hessians
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from small_models import images
from torch import Tensor

from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact import first_order_scores, leave_one_out, predictive_covariance
from tangent_ops.exact.conjugate import solve_many, unpreconditioned
from tangent_ops.exact.inverse import Inverse
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import Layout

L2 = 0.05


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("count", [1, 7])
def test_products(dense: Dense, count: int) -> None:
    passes = dense.problem(L2).system
    directions = noise(count, dense.jacobian.shape[2])
    torch.testing.assert_close(
        passes.products(directions), directions @ dense.hessian(L2) / SAMPLES
    )
    found = torch.cat(passes.tangents_many(directions), dim=1)
    torch.testing.assert_close(found, torch.einsum("ncp,rp->rnc", dense.jacobian, directions))


def test_products_at_logits(dense: Dense) -> None:
    passes = dense.problem(L2, loss=F.cross_entropy).system
    logits, directions = 3 * noise(SAMPLES, CLASSES), noise(3, dense.jacobian.shape[2])
    at = [part for part in logits.split(5 if dense.representation == "passes" else SAMPLES)]
    _, blocks = softmax_hessians(logits)
    weighted = (blocks @ dense.jacobian).flatten(0, 1)
    expected = directions @ dense.jacobian.flatten(0, 1).T @ weighted / SAMPLES
    torch.testing.assert_close(passes.products(directions, at, penalty=False), expected)


def test_products_without_a_sample_each(dense: Dense) -> None:
    passes = dense.problem(L2).system
    gone, directions = [0, 4, 5, 11], noise(4, dense.jacobian.shape[2])
    found = passes.products(directions, without=gone)
    for index, direction, row in zip(gone, directions, found, strict=True):
        keep = [i for i in range(SAMPLES) if i != index]
        torch.testing.assert_close(row, dense.hessian(L2, keep) @ direction / len(keep))


def test_pulled_back_together(dense: Dense) -> None:
    """Cotangents that depend on the value and on each direction's own tangent."""
    inputs, directions = dense.data.tensors[0][:3], noise(4, dense.jacobian.shape[2])
    jacobian, anchor = dense.jacobian[:3], dense.anchor[:3]
    found = Jacobian(dense.tangent).pull_back_many(directions, inputs, lambda f, t: f.sin() + t**2)
    tangents = torch.einsum("ncp,rp->rnc", jacobian, directions)
    expected = torch.einsum("rnc,ncp->rp", anchor.sin() + tangents**2, jacobian)
    torch.testing.assert_close(found, expected)


def test_a_model_that_vmap_refuses(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, directions = dense.data.tensors[0][:3], noise(3, dense.jacobian.shape[2])
    expected = torch.einsum("ncp,rp->rnc", dense.jacobian[:3], directions)
    calls = []

    def refuse(function, *args, **kwargs):
        calls.append(function)
        raise RuntimeError("vmap: no batching rule")

    monkeypatch.setattr(torch.func, "vmap", refuse)
    jacobian = Jacobian(dense.tangent)
    for _ in range(2):
        torch.testing.assert_close(jacobian.outputs_many(directions, inputs)[1], expected)
    assert len(calls) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 1000))
def test_solves(count: int, size: int, seed: int) -> None:
    """Systems of their own, of which some end early: zeros, eigenvectors, equal sides."""
    roots = noise(count, size, size, seed=seed)
    matrices = roots @ roots.mT + torch.eye(size).double()
    rights = noise(count, size, seed=seed + 1)
    rights[count // 2] = torch.linalg.eigh(matrices[count // 2])[1][:, 0]
    rights[-1] = rights[0]
    rights[1:2] = 0
    seen = []

    def product(vectors: Tensor, which: list[int]) -> Tensor:
        seen.append(which)
        return torch.einsum("rij,rj->ri", matrices[which], vectors)

    found = solve_many(product, rights, 1e-9, 1000, unpreconditioned)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, rights), rtol=1e-6, atol=1e-6)
    assert all(1 not in which for which in seen if count > 1)
    assert all(set(later) <= set(which) for which, later in itertools.pairwise(seen))


def test_a_column_that_converges_first_leaves() -> None:
    matrix = torch.diag(torch.arange(1.0, 9.0)).double()
    rights = torch.stack([torch.eye(8)[2].double(), noise(8)])
    seen = []

    def product(vectors: Tensor, which: list[int]) -> Tensor:
        seen.append(which)
        return vectors @ matrix

    found = solve_many(product, rights, 1e-10, 100, unpreconditioned)
    torch.testing.assert_close(found, rights / matrix.diagonal())
    assert seen == [[0, 1]] + 7 * [[1]]
    refused(ConvergenceError, "tol=1e-10 in 3 iterations", solve_many, product, rights, 1e-10, 3,
            unpreconditioned)  # fmt: skip
    refused(ArgumentError, "the loss must be convex", solve_many, lambda v, _: -v, rights, 1e-10, 3,
            unpreconditioned)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 8])
def test_inverse(dense: Dense, rank: int) -> None:
    """Of dependent right-hand sides, too."""
    dense.set(dense.optimum(L2))
    inverse = Inverse(dense.problem(L2), 1e-10, 1000, rank)
    rights = noise(7, dense.jacobian.shape[2])
    rights[3], rights[5], rights[6] = 0, 2 * rights[0] - rights[1], rights[0]
    expected = dense.solve(rights.T, SAMPLES * L2).T * SAMPLES
    torch.testing.assert_close(inverse.many(rights), expected)


def test_blocks_give_what_vectors_give(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    dense.set(dense.optimum(1.0))
    inputs, targets = images(3, seed=9).double(), torch.tensor([1, 2, 3])

    def results() -> list[Tensor]:
        problem = dense.problem(1.0, batch_size=SAMPLES)
        return [
            predictive_covariance(problem, inputs[:1], 1.0, tol=1e-8),
            leave_one_out(problem, [0, 5, 11], inputs, tol=1e-8),
            first_order_scores(problem, inputs, targets, tol=1e-8),
        ]

    rows = dense.rows(inputs[:1])
    exact = torch.stack([one @ dense.solve(one.T, SAMPLES) for one in rows])
    found = {}
    for together in (1, 2):
        monkeypatch.setattr(Layout, "together", property(lambda self, count=together: count))
        found[together] = results()
        torch.testing.assert_close(found[together][0], exact, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[2], found[1], rtol=1e-6, atol=1e-8)


def test_memory_is_bounded() -> None:
    def together(entries: int, dtype: torch.dtype = torch.float32) -> int:
        return Layout({"w": torch.Size([entries])}, dtype, torch.device("cpu")).together

    assert [together(n) for n in (10, 4_000_000, 8_000_000, 86_000_000)] == [8, 8, 4, 1]
    assert together(8_000_000, torch.float64) == 2
