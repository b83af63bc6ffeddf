"""The preconditioners against the dense Hessian, and what they save."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, SAMPLES, Dense, softmax_hessians

from tangent_ops.exact import fit_exact
from tangent_ops.exact.nystrom import Nystrom, sketch_samples
from tangent_ops.exact.preconditioner import default_rank
from tangent_ops.exact.subset import SubsetInverse

L2 = 1e-3


def test_it_inverts_the_leading_part_of_the_hessian(dense: Dense) -> None:
    made = Nystrom(dense.problem(L2).passes, rank=60)  # N C: all of it
    # The Hessian is RᵀR + l2 I: its leading eigenvectors are R's right singular vectors.
    rows = (2 / CLASSES / SAMPLES) ** 0.5 * dense.jacobian.flatten(0, 1)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    least = float(made.values.min()) + L2
    for index in (0, 1, 9, 19):
        vector = vectors[index]
        found = made((values[index] ** 2 + L2) * vector)
        torch.testing.assert_close(found, least * vector, rtol=1e-5, atol=1e-5 * least)
    outside = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).double()
    outside -= vectors.T @ (vectors @ outside)  # no sample has a gradient along it
    torch.testing.assert_close(made(outside), outside)


def test_it_saves_iterations(dense: Dense) -> None:
    some, more = (8, 32) if dense.representation == "passes" else (40, 60)  # of 60 rows
    count = {}
    for rank in (0, some, more):
        dense.set(torch.zeros_like(dense.delta))
        count[rank] = fit_exact(dense.problem(L2), tol=1e-8, rank=rank).iterations
    assert count[some] <= 0.8 * count[0] and count[more] <= 0.5 * count[0]


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["square", "cross-entropy"])
def test_a_subset_of_all_samples_is_the_inverse(dense: Dense, loss) -> None:
    """Of the Hessian at Δ = 0, the sum over samples; up to the factor λ = N l2."""
    problem = dense.problem(L2, representation="factors", loss=loss)
    blocks = None if loss is None else softmax_hessians(dense.anchor)[1]
    vectors = torch.randn(2, dense.jacobian.shape[2], generator=torch.Generator().manual_seed(0))
    found = SubsetInverse([problem.system], rows=60)(vectors.double())
    exact = torch.stack([dense.solve(v, SAMPLES * L2, blocks) for v in vectors.double()])
    torch.testing.assert_close(found, SAMPLES * L2 * exact)


def test_a_subset_of_shards_is_the_inverse_of_their_sum(dense: Dense) -> None:
    """Shards of other sizes give as large a part of their samples."""
    parts = [dense.problem(L2, dense.kept(*part), representation="factors").system for part in
             ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11])]  # fmt: skip
    vector = torch.randn(
        dense.jacobian.shape[2], generator=torch.Generator().manual_seed(0)
    ).double()
    found = SubsetInverse(parts, rows=60)(vector)
    torch.testing.assert_close(found, SAMPLES * L2 * dense.solve(vector, SAMPLES * L2))


def test_its_size(dense: Dense) -> None:
    assert default_rank(dense.problem(L2).passes) == SAMPLES
    assert [sketch_samples(n) for n in (10, 32, 400, 10**6)] == [10, 32, 50, 512]
