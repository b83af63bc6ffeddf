"""The Nyström preconditioner against the dense Hessian, and what it saves."""

from __future__ import annotations

import torch
from dense import CLASSES, SAMPLES, Dense

from tangent_ops.exact import fit_exact
from tangent_ops.exact.nystrom import Nystrom, default_rank, sketch_samples

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
    count = {}
    for rank in (0, 8, 32):
        dense.set(torch.zeros_like(dense.delta))
        count[rank] = fit_exact(dense.problem(L2), tol=1e-8, rank=rank).iterations
    assert count[8] <= 0.8 * count[0] and count[32] <= 0.5 * count[0]


def test_its_size(dense: Dense) -> None:
    assert default_rank(dense.problem(L2).passes) == SAMPLES
    assert [sketch_samples(n) for n in (10, 32, 400, 10**6)] == [10, 32, 50, 512]
