"""The Nyström preconditioner against the dense Hessian, and what it saves."""

from __future__ import annotations

import pytest
import torch
from dense import QUIET, SAMPLES, Dense, make

from tangent_ops.exact import fit_exact
from tangent_ops.exact.nystrom import Nystrom, default_rank, sketch_samples
from tangent_ops.exact.problem import Problem

L2 = 1e-3


@pytest.fixture(scope="module")
def dense() -> Dense:
    return make()


def test_it_inverts_the_leading_part_of_the_hessian(dense: Dense) -> None:
    problem = Problem(dense.tangent, dense.data, L2)
    made = Nystrom(problem, rank=60)  # N C: all of it
    values, vectors = torch.linalg.eigh(dense.hessian(L2) / SAMPLES)
    least = float(made.values.min()) + L2
    for index in (-1, -2, -10, -20):
        vector = vectors[:, index]
        found = made(values[index] * vector)
        torch.testing.assert_close(found, least * vector, rtol=1e-5, atol=1e-5 * least)
    outside = vectors[:, 0]  # no sample has a gradient along it
    torch.testing.assert_close(made(outside), outside)


def test_it_saves_iterations(dense: Dense) -> None:
    count = {}
    for rank in (0, 8, 32):
        dense.set(torch.zeros_like(dense.delta))
        count[rank] = fit_exact(
            dense.tangent, dense.data, L2, tol=1e-8, rank=rank, **QUIET
        ).iterations
    assert count[8] <= 0.8 * count[0] and count[32] <= 0.5 * count[0]


def test_its_size(dense: Dense) -> None:
    problem = Problem(dense.tangent, dense.data, L2)
    assert default_rank(problem) == SAMPLES
    assert [sketch_samples(n) for n in (10, 32, 400, 10**6)] == [10, 32, 50, 512]
