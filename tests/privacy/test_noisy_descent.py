"""Noisy descent: each group's clip, the noise, the steps, and the statement."""

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
from regression_problem import (
    CLASSES,
    N,
    Written,
    coordinates,
    in_coordinates,
    samples,
    tangent,
    without,
)
from torch import Tensor, nn

from tangent_ops import load_delta, save_delta
from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.privacy import GroupClips, Privacy, fit_noisy_descent, statement_of
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.regression.noisy_descent import clipped_gradients

CORE, HEAD = 8.0, 34.0
CLIPS = GroupClips(CORE, HEAD, core_share=0.3)
WIDE = GroupClips(core=1e6, head=1e6)
PRIVACY = Privacy(delta=1e-3, noise_multiplier=2.0, steps=1)
WHERE = coordinates(tangent())


class Recording(Silent):
    """Draws zeros, and keeps the standard deviations."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    def normal(self, shape, std, dtype, device):
        self.asked.append(std)
        return super().normal(shape, std, dtype, device)


def fitted(data=None, clips=CLIPS, source: NoiseSource | None = None, lr=0.5, **options):
    model = options.pop("model", None) or tangent()
    privacy, where = options.pop("privacy", PRIVACY), options.pop("where", WHERE)
    source = Silent() if source is None else source
    data = samples() if data is None else data
    with patch.object(Privacy, "noise_source", lambda self: source):
        return fit_noisy_descent(
            model, data, privacy, where, clips, lr=lr, progress=False, **options
        )


def written_steps(data, clips, steps, lr, l2, where=WHERE) -> tuple[Tensor, Tensor]:
    """The descent without noise, sample by sample, from torch.func's Jacobian."""
    found = Written.of(tangent(), where, data)
    z = torch.zeros(where.core.shape[1]).double()
    columns = torch.zeros(CLASSES, where.head.shape[1]).double()
    for _ in range(steps):
        sums = torch.zeros_like(z), torch.zeros_like(columns)
        for phi, a, r in zip(found.phi, found.inputs, found.residuals, strict=True):
            left = r - phi @ z - columns @ a
            for total, own, clip in (
                (sums[0], phi.T @ left, clips.core),
                (sums[1], torch.outer(left, a), clips.head),
            ):
                total += own * min(1.0, clip / float(own.norm()))
        z = z + lr * sums[0] / len(data)
        columns = columns + lr * sums[1] / len(data)
        z = z / (1 + lr * l2 * CLASSES / 2 * where.core.norm(dim=0) ** 2)
        columns = columns / (1 + lr * l2 * CLASSES / 2 * where.head.norm(dim=0) ** 2)
    return z, columns


@pytest.mark.parametrize(("steps", "l2"), [(1, 0.0), (4, 0.1)])
def test_steps_are_those_written_out(steps: int, l2: float) -> None:
    found = fitted(privacy=replace(PRIVACY, steps=steps), l2=l2, batch_size=5)
    expected = written_steps(samples(), CLIPS, steps, 0.5, l2)
    for mine, other in zip(in_coordinates(found.delta, WHERE), expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-9)


def test_both_clips_and_neither_are_in_these_tests() -> None:
    found = Written.of(tangent(), WHERE, samples())
    core = torch.einsum("nck,nc->nk", found.phi, found.residuals).norm(dim=1)
    head = found.residuals.norm(dim=1) * found.inputs.norm(dim=1)
    for norms, clip in ((core, CORE), (head, HEAD)):
        assert 0 < int((norms > clip).sum()) < N


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 4),
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    powers=st.lists(st.floats(-9, 100), min_size=3, max_size=3),
    clips=st.tuples(*[st.floats(1e-3, 1e3)] * 2),
    share=st.floats(0.01, 0.99),
)
def test_a_sample_moves_a_step_by_at_most_what_the_noise_covers(
    seed: int, n: int, sizes: tuple, powers: list, clips: tuple, share: float
) -> None:
    c, k, h = sizes
    noise = torch.Generator().manual_seed(seed)
    phi, a, r = (
        10.0**power * torch.randn(shape, generator=noise, dtype=torch.float64)
        for power, shape in zip(powers, ((n, c, k), (n, h), (n, c)), strict=True)
    )
    both = GroupClips(*clips, core_share=share)
    whole = clipped_gradients(FeatureRows(r, phi, a), r, both)
    fewer = clipped_gradients(FeatureRows(r[:-1], phi[:-1], a[:-1]), r[:-1], both)
    shares = (share, 1 - share)
    parts = [
        float((mine - other).norm()) / clip
        for mine, other, clip in zip(whole, fewer, clips, strict=True)
    ]
    square = sum(part**2 * own for part, own in zip(parts, shares, strict=True))
    assert square <= 1 + 1e-9
    own = (phi[-1].T @ r[-1]).norm(), r[-1].norm() * a[-1].norm()
    for part, norm, clip in zip(parts, own, clips, strict=True):
        if norm > clip:  # worst cases reach the bound
            assert part == pytest.approx(1, rel=1e-6)


def test_neighbours_first_steps_are_within_the_noise() -> None:
    data, source = samples(), Recording()
    whole = fitted(data, source=source)
    units = [0.5 / N * std for std in source.asked]  # of z and Z after one step
    moves = []
    for index in range(N):
        other = fitted(without(data, index), lr=0.5 * (N - 1) / N)  # the same lr / N
        pairs = zip(
            in_coordinates(whole.delta, WHERE),
            in_coordinates(other.delta, WHERE),
            units,
            strict=True,
        )
        moves.append(math.sqrt(sum(float(((a - b) / s).square().sum()) for a, b, s in pairs)))
    assert max(moves) <= 1 / 2.0 * (1 + 1e-6)  # 1/σ
    assert max(moves) >= 0.99 / 2.0


def test_noise_has_the_deviations_stated() -> None:
    source = Recording()
    fitted(source=source, privacy=replace(PRIVACY, steps=2))
    expected = [CORE * 2.0 / math.sqrt(0.3), HEAD * 2.0 / math.sqrt(0.7)]
    assert source.asked == pytest.approx(expected * 2)
    exact = in_coordinates(fitted().delta, WHERE)
    noises: list[list[Tensor]] = [[], []]
    for seed in range(30):
        noisy = in_coordinates(fitted(source=NoiseSource(seed)).delta, WHERE)
        for found, mine, other in zip(noises, noisy, exact, strict=True):
            found.append((mine - other).flatten() * N / 0.5)
    for found, std in zip(noises, expected, strict=True):
        drawn = torch.cat(found) / std
        assert abs(float(drawn.square().mean()) - 1) < 5 * math.sqrt(2 / len(drawn))


@pytest.mark.parametrize(("core", "head"), [(4, 0), (0, 5)])
def test_one_group_alone_has_the_whole_budget(core: int, head: int) -> None:
    where, source = coordinates(tangent(), core, head), Recording()
    clips = GroupClips(CORE if core else None, HEAD if head else None)
    found = fitted(where=where, clips=clips, source=source)
    assert source.asked == pytest.approx([2.0 * (CORE if core else HEAD)])
    moved = {name for name, value in found.delta.items() if value.any()}
    assert moved == ({"body.weight"} if core else {"head.weight", "head.bias"})


def test_many_steps_without_noise_and_clipping_reach_the_ridge_solution() -> None:
    found = fitted(clips=WIDE, privacy=replace(PRIVACY, steps=3000), l2=0.2, lr=0.1)
    solution = Written.of(tangent(), WHERE, samples()).ridge(0.2)
    mine = torch.cat([part.flatten() for part in in_coordinates(found.delta, WHERE)])
    assert torch.allclose(mine, solution, rtol=1e-6, atol=1e-6)


def test_the_statement_is_that_of_its_steps(tmp_path) -> None:
    model = tangent()
    found = fitted(model=model, privacy=Privacy(delta=1e-3, target_epsilon=2.0, steps=9))
    (phase,) = found.statement.phases
    mu = 3 / phase.noise_multiplier
    assert gaussian_failure(mu, 2.0) <= 1e-3 < gaussian_failure(mu * 1.003, 2.0)
    assert (phase.steps, phase.sample_rate) == (9, 1.0)
    found.statement.verify()
    assert all(torch.equal(found.delta[n], v.detach()) for n, v in model.deltas().items())
    save_delta(found.delta, tmp_path / "delta.safetensors")
    assert statement_of(load_delta(tmp_path / "delta.safetensors")) == found.statement
    again = Privacy(delta=1e-3, noise_multiplier=2.0, steps=1, start=found.statement)
    second = fitted(model=model, privacy=again)
    assert second.statement.phases == (phase, *second.statement.phases[1:])
    refused(ArgumentError, "the deltas are not zero", fitted, model=model)


def test_wrong_arguments_are_refused() -> None:
    for error, message, options in (
        (ArgumentError, "lr must be at most 1", {"lr": 1.5}),
        (ArgumentError, "lr must be positive", {"lr": 0.0}),
        (ArgumentError, "l2", {"l2": -1.0}),
        (ArgumentError, "clips.head is None", {"clips": replace(CLIPS, head=None)}),
        (ArgumentError, "another anchor or basis", {"where": replace(WHERE, anchor="x")}),
        (ArgumentError, "max_grad_norm", {"privacy": replace(PRIVACY, max_grad_norm=1.0)}),
        (UnsupportedError, "RescaledSquareLoss", {"loss": nn.MSELoss()}),
    ):
        refused(error, message, fitted, **options)
    refused(ArgumentError, "core_share must be between", GroupClips, 1.0, 1.0, 1.0)
    refused(ArgumentError, "core must be positive", GroupClips, -1.0, 1.0)
