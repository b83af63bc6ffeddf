"""Noisy statistics: what a sample can change, the noise, the solutions, and the statement."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from bounded_problem import Silent
from gaussian_oracle import gaussian_failure
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from regression_problem import CLASSES, N, Written, coordinates, samples, tangent, without
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, TensorDataset

from tangent_ops import load_delta, save_delta, statistics
from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.errors import ArgumentError, StatisticsError, UnsupportedError
from tangent_ops.privacy import (
    FeatureBounds,
    NoisyStatistics,
    Privacy,
    Shares,
    add_shards,
    noisy_statistics,
    public_coordinates,
    statement_of,
)
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.regression.noisy_statistics import clipped_sums, noise_for

PRIVACY = Privacy(delta=1e-3, noise_multiplier=2.0)
LIMITS = (1.5, 2.0, 6.0)
BOUNDS = FeatureBounds(*LIMITS)
WIDE = FeatureBounds(core=1e6, head=1e6, residual=1e6)
MODEL = tangent()
WHERE = coordinates(MODEL)


def released(
    data=None, bounds=BOUNDS, source: NoiseSource | None = None, **options
) -> NoisyStatistics:
    data = samples() if data is None else data
    privacy, where = options.pop("privacy", PRIVACY), options.pop("where", WHERE)
    source = Silent() if source is None else source
    with patch.object(Privacy, "noise_source", lambda self: source):
        return noisy_statistics(
            options.pop("model", MODEL), data, privacy, where, bounds, progress=False, **options
        )


def distance(one: NoisyStatistics, other: NoisyStatistics) -> float:
    """Of two releases, in units of the noise: the mean of their privacy loss is half its square."""
    square = 0.0
    for name, std in one.spread.items():
        apart = one.sums[name] - other.sums[name]
        # Beside the diagonal the deviation is 1/√2 of that, for each of two equal entries.
        square += float((apart / std).square().sum())
    return math.sqrt(square)


def outliers() -> TensorDataset:
    """Some features and residuals are far above the bounds."""
    return TensorDataset(
        *(
            torch.cat(pair)
            for pair in zip(samples().tensors, samples(4, 3.0, seed=3).tensors, strict=True)
        )
    )


@pytest.mark.parametrize("shares", [Shares(), Shares(0.6, 0.0), Shares(0.0, 0.0, core=0.8)])
def test_no_sample_changes_a_release_by_more_than_the_noise_covers(shares: Shares) -> None:
    data = outliers()
    whole = released(data, shares=shares)
    moves = [distance(released(without(data, i), shares=shares), whole) for i in range(len(data))]
    most = 1 / 2.0  # 1/σ
    if not shares.curvature:  # the public curvature is scaled by the number of samples only
        assert whole.spread.keys() == {"core_residual", "head_residual"}
    assert max(moves) <= most * (1 + 1e-9)
    assert max(moves) >= 0.3 * most  # the bound is of this size, not of another


def sums_of(phi: Tensor, inputs: Tensor, residuals: Tensor, bounds: FeatureBounds) -> dict:
    rows = FeatureRows(torch.zeros_like(residuals), phi, inputs)
    sums = clipped_sums(rows, residuals, bounds)
    c, flat = residuals.shape[1], sums["core_head"].flatten(1)
    head = torch.kron(torch.eye(c).double(), sums["head_head"])
    whole = torch.cat([torch.cat([sums["core_core"], flat], 1), torch.cat([flat.T, head], 1)])
    return sums | {"least_eigenvalue": torch.linalg.eigvalsh(whole)[0]}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 4),
    c=st.integers(1, 3),
    k=st.integers(1, 3),
    h=st.integers(1, 3),
    powers=st.lists(st.floats(-9, 200), min_size=3, max_size=3),
    worst=st.booleans(),
    bounds=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
)
def test_each_sum_has_its_sensitivity(
    seed: int, n: int, c: int, k: int, h: int, powers: list, worst: bool, bounds: tuple
) -> None:
    noise = torch.Generator().manual_seed(seed)
    drawn = [
        10.0**power * torch.randn(shape, generator=noise, dtype=torch.float64)
        for power, shape in zip(powers, ((n, c, k), (n, h), (n, c)), strict=True)
    ]
    core, head, residual = bounds
    if worst:  # the last sample has features of rank one along its residual, at all bounds
        output = torch.randn(c, generator=noise, dtype=torch.float64)
        drawn[0][-1] = 1e30 * torch.outer(output, torch.randn(k, generator=noise).double())
        drawn[1][-1] = 1e30 * torch.randn(h, generator=noise, dtype=torch.float64)
        drawn[2][-1] = 1e30 * output
    limits = FeatureBounds(core, head, residual)
    whole = sums_of(*drawn, limits)
    fewer = sums_of(*(part[:-1] for part in drawn), limits)
    # Written out here, as in the module's docstring.
    allowed = {
        "core_core": core**2,
        "core_head": core * head,
        "head_head": head**2,
        "core_residual": core * residual,
        "head_residual": head * residual,
        "least_eigenvalue": core**2 + head**2,
    }
    size = max(float(value.abs().max()) for value in whole.values())
    for name, most in allowed.items():
        moved = float((whole[name] - fewer[name]).norm())
        assert moved <= most * (1 + 1e-9) + 1e-12 * size, name
        if worst and name != "least_eigenvalue":
            assert moved >= most * (1 - 1e-6) - 1e-12 * size, name


def test_the_least_eigenvalue_can_move_by_its_whole_sensitivity() -> None:
    bounds = FeatureBounds(3.0, 4.0, 1.0)
    # One output and two directions, (3, 4) and (3, -4): both at the bounds.
    phi = torch.tensor([3.0, 3.0]).double().reshape(2, 1, 1)
    inputs = torch.tensor([[4.0], [-4.0]]).double()
    residuals = torch.zeros(2, 1).double()
    many = [x.repeat(1000, *[1] * (x.ndim - 1)) for x in (phi[:1], inputs[:1], residuals[:1])]
    orthogonal = [torch.tensor([[[3.0]]]).double(), torch.tensor([[-9 / 4]]).double()]
    before = sums_of(*many, bounds)["least_eigenvalue"]
    after = [torch.cat(p) for p in zip(many, (*orthogonal, residuals[:1]), strict=True)]
    moved = float(sums_of(*after, bounds)["least_eigenvalue"] - before)
    assert moved == pytest.approx(9 + 81 / 16, rel=1e-9)
    assert moved <= 25


def test_noise_of_symmetric_sums_is_symmetric_and_as_large_as_stated() -> None:
    source = NoiseSource(0)
    draws = torch.stack(
        [noise_for(source, "core_core", torch.zeros(4, 4), 3.0) for _ in range(4000)]
    )
    assert torch.equal(draws, draws.mT)
    spread = draws.std(0)
    expected = torch.full((4, 4), 3 / math.sqrt(2)).fill_diagonal_(3.0)
    assert torch.allclose(spread, expected.to(spread), rtol=5 / math.sqrt(2 * 4000))
    entries = draws[:, *torch.triu_indices(4, 4)]
    assert float(entries.T.corrcoef().fill_diagonal_(0).abs().max()) < 5 / math.sqrt(4000)


def test_a_release_has_independent_noise_of_the_stated_size() -> None:
    exact = released()
    units: dict[str, list[Tensor]] = {}
    for seed in range(12):
        one = released(source=NoiseSource(seed))
        assert one.spread == exact.spread
        for name, std in one.spread.items():
            units.setdefault(name, []).append((one.sums[name] - exact.sums[name]) / std)
    for name, found in units.items():
        drawn = torch.stack(found)
        if name in ("core_core", "head_head"):
            rows, columns = torch.triu_indices(*drawn.shape[1:])
            drawn = drawn[:, rows, columns] * torch.where(rows == columns, 1.0, math.sqrt(2))
        count = drawn.numel()
        assert abs(float(drawn.square().mean()) - 1) < 5 * math.sqrt(2 / count), name
        assert abs(float(drawn.mean())) < 5 / math.sqrt(count), name


def test_clipping_is_each_samples_own() -> None:
    data = outliers()
    written = Written.of(MODEL, WHERE, data)
    expected: dict[str, Tensor] = {}
    for phi, a, r in zip(written.phi, written.inputs, written.residuals, strict=True):
        phi, a, r = (
            part * min(1.0, limit / float(part.norm()))
            for part, limit in zip((phi, a, r), LIMITS, strict=True)
        )
        own = {
            "core_core": phi.T @ phi,
            "core_head": phi.T[:, :, None] * a,
            "head_head": torch.outer(a, a),
            "core_residual": phi.T @ r,
            "head_residual": torch.outer(r, a),
        }
        expected = {name: expected.get(name, 0) + value for name, value in own.items()}
    found = released(data, batch_size=5)
    for name, value in expected.items():
        assert torch.allclose(found.sums[name], value, rtol=1e-9, atol=1e-9), name
    least = float(torch.linalg.eigvalsh(assembled(found.sums))[0])
    assert float(found.sums["least_eigenvalue"]) == pytest.approx(least, abs=1e-9)


def assembled(sums: dict[str, Tensor]) -> Tensor:
    flat = sums["core_head"].flatten(1)
    head = torch.kron(torch.eye(CLASSES).double(), sums["head_head"])
    return torch.cat([torch.cat([sums["core_core"], flat], 1), torch.cat([flat.T, head], 1)])


@pytest.mark.parametrize("l2", [0.02, 3.0])
@pytest.mark.parametrize(("core", "head"), [(4, 5), (0, 5), (3, 0)])
def test_without_noise_and_clipping_it_is_the_ridge_solution(core: int, head: int, l2: float):
    where = coordinates(MODEL, core, head)
    jacobian = Written.of(MODEL, where, samples())
    rows, solution = jacobian.rows().flatten(0, 1), jacobian.ridge(l2)
    bounds = replace(WIDE, core=WIDE.core if core else None, head=WIDE.head if head else None)
    found = released(where=where, bounds=bounds).solve(l2)
    model = tangent()
    model.load_delta_dict(found)
    inputs, _ = samples().tensors
    with torch.no_grad():
        moved = model(inputs) - MODEL(inputs)
    assert torch.allclose(moved.flatten(), rows @ solution, rtol=1e-9, atol=1e-9)


def test_with_all_directions_it_is_the_optimum_of_exact_statistics() -> None:
    """Without noise and clips; `statistics` computes in the deltas themselves."""
    where = public_coordinates(
        MODEL, samples(20, seed=8), core=6, head=7, floor=0.1, progress=False
    )
    exact = statistics(MODEL, samples(), fraction_bits=40, progress=False).solve(0.3)
    found = released(where=where, bounds=WIDE).solve(0.3)
    assert found.keys() == exact.keys()
    assert all(torch.allclose(found[n], exact[n], rtol=1e-7, atol=1e-9) for n in exact)


def test_adassps_ridge_is_on_the_coordinates() -> None:
    found = released(source=NoiseSource(2))
    values, vectors = torch.linalg.eigh(assembled(found.sums))
    right = torch.cat([found.sums["core_residual"], found.sums["head_residual"].flatten()])
    solution = vectors @ ((vectors.T @ right) / (values.clamp_min(0) + found.ridge))
    k = WHERE.core.shape[1]
    expected = WHERE.deltas(solution[:k], solution[k:].reshape(CLASSES, -1))
    for name, value in found.solve().items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-9)


def test_public_curvature_takes_the_place_of_the_private() -> None:
    public = Written.of(MODEL, WHERE, samples(20, seed=8)).rows().flatten(0, 1)
    private = Written.of(MODEL, WHERE, samples())
    found = released(bounds=WIDE, shares=Shares(0.0, 0.0))
    assert found.spread.keys() == {"core_residual", "head_residual"} and found.ridge == 0
    right = private.rows().flatten(0, 1).T @ private.residuals.flatten()
    h = public.T @ public * (N / 20)
    solution = torch.linalg.solve(h + private.penalty(0.5, N).diag(), right)
    k = WHERE.core.shape[1]
    expected = WHERE.deltas(solution[:k], solution[k:].reshape(CLASSES, -1))
    for name, value in found.solve(0.5).items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-9)


def test_negative_eigenvalues_count_as_zero() -> None:
    found = released(source=NoiseSource(1))
    values, vectors = torch.linalg.eigh(assembled(found.sums))
    assert float(values[0]) < 0  # the noise is that large
    right = torch.cat([found.sums["core_residual"], found.sums["head_residual"].flatten()])
    h = vectors @ values.clamp_min(0).diag() @ vectors.T
    penalty = Written.of(MODEL, WHERE, samples()).penalty(0.1, N)
    solution = torch.linalg.solve(h + penalty.diag(), right)
    k = WHERE.core.shape[1]
    expected = WHERE.deltas(solution[:k], solution[k:].reshape(CLASSES, -1))
    for name, value in found.solve(0.1).items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-9)
    refused(StatisticsError, "use a larger l2", found.solve, 0.0)
    refused(ArgumentError, "l2", found.solve, -1.0)


def test_the_ridge_is_what_the_noise_may_amount_to() -> None:
    exact = released(shares=Shares(0.5, 0.0))
    norms = []
    for seed in range(200):
        noisy = {
            name: noise_for(NoiseSource(1000 + seed), name, exact.sums[name], exact.spread[name])
            for name in ("core_core", "core_head", "head_head")
        }
        norms.append(float(torch.linalg.matrix_norm(assembled(noisy), 2)))
    assert sum(norm > exact.ridge for norm in norms) <= 10  # 5%
    assert max(norms) > 0.4 * exact.ridge
    # A least eigenvalue that is surely large lowers it.
    adaptive = released(outliers())
    large = adaptive.sums | {"least_eigenvalue": torch.tensor(1e6).double()}
    assert replace(adaptive, sums=large).ridge == 0
    assert adaptive.ridge > 0


@pytest.mark.parametrize("epsilon", [0.5, 4.0])
def test_the_statement_is_that_of_one_gaussian_mechanism(epsilon: float, tmp_path) -> None:
    found = released(privacy=Privacy(delta=1e-3, target_epsilon=epsilon))
    statement = found.statement
    (phase,) = statement.phases
    sigma = phase.noise_multiplier
    assert gaussian_failure(1 / sigma, epsilon) <= 1e-3 < gaussian_failure(1.003 / sigma, epsilon)
    core, head, residual = LIMITS
    third = sigma * math.sqrt(3)  # of AdaSSP's thirds, each divided further
    spread = {
        "core_core": core**2 * third * math.sqrt(3),
        "core_head": core * head * third * math.sqrt(3),
        "head_head": head**2 * third * math.sqrt(3),
        "core_residual": core * residual * third * math.sqrt(2),
        "head_residual": head * residual * third * math.sqrt(2),
        "least_eigenvalue": (core**2 + head**2) * third,
    }
    assert found.spread == pytest.approx(spread)
    statement.verify()
    for l2 in (None, 0.1, 1.0):
        save_delta(found.solve(l2), tmp_path / "delta.safetensors")
        assert statement_of(load_delta(tmp_path / "delta.safetensors")) == statement
    assert "the number of samples is public" in statement.assumes


def test_a_start_adds_its_phases_and_its_deltas() -> None:
    first = released()
    model = tangent()
    model.load_delta_dict(first.solve(1.0))
    start = Privacy(delta=1e-3, noise_multiplier=2.0, start=first.statement)
    second = released(model=model, privacy=start, bounds=WIDE)
    assert len(second.statement.phases) == 2
    assert second.statement.epsilon > 1.2 * first.statement.epsilon
    written = Written.of(model, WHERE, samples())
    right = torch.einsum("nck,nc->k", written.phi, written.residuals)
    assert torch.allclose(second.sums["core_residual"], right, rtol=1e-9, atol=1e-9)
    far = second.solve(1e12)  # the solution vanishes, the start stays
    assert all(torch.allclose(far[n], v.detach(), atol=1e-9) for n, v in model.deltas().items())
    refused(ArgumentError, "the deltas are not zero", released, model=model)


def test_shards_add_up_with_the_epsilon_of_one() -> None:
    data = samples()
    halves = [TensorDataset(*(c[part] for c in data.tensors)) for part in (slice(5), slice(5, N))]
    found = {str(i): released(half, bounds=WIDE) for i, half in enumerate(halves)}
    both, whole = add_shards(found), released(bounds=WIDE)
    for name in ("core_core", "core_head", "head_head", "core_residual", "head_residual"):
        assert torch.allclose(both.sums[name], whole.sums[name], rtol=1e-12, atol=1e-12)
        assert both.spread[name] == pytest.approx(math.sqrt(2) * whole.spread[name])
    assert both.samples == N
    assert both.statement.epsilon == found["0"].statement.epsilon
    assert "no sample is in two" in " ".join(both.statement.assumes)
    assert both.solve(0.3).keys() == whole.solve(0.3).keys()
    other = released(halves[1], privacy=replace(PRIVACY, noise_multiplier=3.0))
    refused(UnsupportedError, "other phases", add_shards, {"a": found["0"], "b": other})
    where = coordinates(MODEL, 3, 5)
    other = released(halves[1], where=where, bounds=WIDE)
    refused(ArgumentError, "other coordinates", add_shards, {"a": found["0"], "b": other})
    refused(ArgumentError, "must map shards", add_shards, {})


def test_wrong_arguments_are_refused() -> None:
    twice = ConcatDataset([samples(), samples()])
    for error, message, options in (
        (ArgumentError, "not below 1/N", {"privacy": replace(PRIVACY, delta=0.5)}),
        (ArgumentError, "does not use steps", {"privacy": replace(PRIVACY, steps=3)}),
        (ArgumentError, "bounds.core is None", {"bounds": replace(BOUNDS, core=None)}),
        (ArgumentError, "another anchor or basis", {"where": replace(WHERE, basis="x")}),
        (ArgumentError, "2 times", {"data": twice}),
        (UnsupportedError, "RescaledSquareLoss", {"loss": nn.CrossEntropyLoss()}),
    ):
        refused(error, message, released, **options)
    refused(ArgumentError, "leave nothing for g", Shares, 0.5, 0.5)
    refused(ArgumentError, "give both", Shares, 0.0, 0.5)
    refused(ArgumentError, "core must be between", Shares, core=1.0)
    refused(ArgumentError, "residual must be positive", FeatureBounds, 1.0, 1.0, 0.0)
    infinite = samples()
    infinite.tensors[0][1, 2] = math.nan
    refused(ArgumentError, "not finite", released, infinite)


def test_coordinates_whiten_the_public_data() -> None:
    where = public_coordinates(
        MODEL, samples(20, seed=8), core=4, head=5, floor=0.0, progress=False
    )
    core, _, head = where.curvature
    assert torch.allclose(core, torch.eye(4).double(), atol=1e-9)
    assert torch.allclose(head, torch.eye(5).double(), atol=1e-9)
    written = Written.of(MODEL, where, samples(20, seed=8))
    gradients = torch.einsum("nck,nc->nk", written.phi, written.residuals)
    assert torch.allclose(where.norms.core, written.phi.flatten(1).norm(dim=1))
    assert torch.allclose(where.norms.head, written.inputs.norm(dim=1))
    assert torch.allclose(where.norms.residual, written.residuals.norm(dim=1))
    assert torch.allclose(where.norms.core_gradient, gradients.norm(dim=1))
    outer = written.residuals[:, :, None] * written.inputs[:, None]
    assert torch.allclose(where.norms.head_gradient, outer.flatten(1).norm(dim=1))
    public = {"progress": False, "core": 4, "head": 5}
    refused(ArgumentError, "both 0", public_coordinates, MODEL, samples(), core=0, head=0)
    refused(
        ArgumentError, "model has 6", public_coordinates, MODEL, samples(), **public | {"core": 7}
    )
    few = TensorDataset(*(c[:3] for c in samples().tensors))
    refused(ArgumentError, "fewer than 5 directions", public_coordinates, MODEL, few, **public,
            floor=0.0)  # fmt: skip
