"""The study's private mechanisms on features that are read once, against the library's calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import TensorDataset

from studies.paper.parts import privacy as part
from studies.paper.parts import private_subspace
from studies.paper.parts.private_subspace import FRESH, SHARES, Given, PublicSubspace
from studies.paper.parts.private_ways import (
    Read,
    bounds_of,
    clips_of,
    descend,
    fit_by_opacus,
    narrowed,
    ordinary_core,
    read,
    release,
    solution,
    without_repetitions,
)
from tangent_ops import CachedFeatures, LinearizedModel, linearize
from tangent_ops.model.core_basis import CoreBasis, core_basis
from tangent_ops.privacy import (
    Privacy,
    PublicCoordinates,
    fit_noisy_descent,
    noisy_statistics,
    public_coordinates,
)
from tangent_ops.privacy.accounting import noise_multiplier_for
from tangent_ops.privacy.regression.noisy_statistics import clipped_sums

INPUTS, HIDDEN, CLASSES, N = 4, 6, 3, 12
SIZES = ((4, 5), (2, 3), (0, 5))


class Net(nn.Module):
    """One hidden layer, whose weight gets a core, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def samples(count: int = N, seed: int = 1) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, INPUTS, generator=draw, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=draw))


def anchored() -> tuple[Net, CoreBasis]:
    torch.manual_seed(0)
    model = Net().double()
    public = samples(20, seed=7)
    return model, core_basis(model, public, size=(3, 2), trainable=r"^(body\.weight|head)")


def tangent() -> LinearizedModel:
    model, basis = anchored()
    return linearize(model, core=basis)


def coordinates(model: LinearizedModel, core: int = 4, head: int = 5) -> PublicCoordinates:
    options: dict[str, Any] = {"floor": 0.01, "progress": False}
    return public_coordinates(model, samples(20, seed=8), core=core, head=head, **options)


def _setting(core: int, head: int) -> tuple[LinearizedModel, PublicCoordinates, Read, Read]:
    """The model, narrowed coordinates, and public and private samples in them."""
    model = tangent()
    where = coordinates(model)
    public, private = (read(model, data, where) for data in (samples(20, seed=8), samples()))
    return (
        model,
        narrowed(where, core, head),
        public.narrowed(core, head),
        private.narrowed(core, head),
    )


def _delta(where: PublicCoordinates, found: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in where.deltas(*found).values()])


def _flat(delta: Any) -> Tensor:
    return torch.cat([value.flatten() for value in delta.values()])


@pytest.mark.parametrize(("core", "head"), SIZES)
def test_narrowed_coordinates_are_the_public_data_s_own(core: int, head: int) -> None:
    model, where, public, _ = _setting(core, head)
    own = coordinates(model, core, head)
    for mine, theirs in (
        (where.core, own.core),
        (where.head, own.head),
        *zip(where.curvature, own.curvature, strict=True),
    ):
        torch.testing.assert_close(mine, theirs)
    clips, bounds = clips_of(public, 0.5, 0.2), bounds_of(public, 0.5)
    assert clips.core_share == 0.2
    assert math.isclose(clips.head or 0, float(own.norms.head_gradient.quantile(0.5)))
    assert math.isclose(bounds.residual, float(own.norms.residual.quantile(0.5)))
    if core:
        assert math.isclose(clips.core or 0, float(own.norms.core_gradient.quantile(0.5)))
        assert math.isclose(bounds.core or 0, float(own.norms.core.quantile(0.5)))
    else:
        assert clips.core is None and bounds.core is None


@pytest.mark.parametrize(("core", "head"), SIZES)
def test_descent_is_the_library_s(core: int, head: int) -> None:
    model, where, public, private = _setting(core, head)
    privacy = Privacy(delta=1e-3, noise_multiplier=0.5, steps=4, seed=3)
    clips = clips_of(public, 0.5, 0.2)
    found = _delta(where, descend(private, privacy, clips, lr=0.3, steps=4))
    fitted = fit_noisy_descent(model, samples(), privacy, where, clips, lr=0.3, progress=False)
    torch.testing.assert_close(found, _flat(fitted.delta))
    without = descend(private, None, clips, lr=0.3, steps=4)
    assert not torch.allclose(found, _delta(where, without))
    single = descend(private.single(), None, clips, lr=0.3, steps=4)
    for found_part, expected in zip(single, without, strict=True):
        torch.testing.assert_close(found_part, expected.float())


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize(("core", "head"), SIZES)
def test_statistics_are_the_library_s(core: int, head: int, kind: str) -> None:
    model, where, public, private = _setting(core, head)
    privacy = Privacy(delta=1e-3, noise_multiplier=0.5, seed=3)
    bounds, shares = bounds_of(public, 0.5), SHARES[kind]
    sums = clipped_sums(private.rows, private.residuals, bounds)
    released = release(sums, N, model.delta_dict(), where, privacy, bounds, shares)
    expected = noisy_statistics(
        model, samples(), privacy, where, bounds, shares=shares, progress=False
    )
    assert released.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        torch.testing.assert_close(released.sums[name], value)
    l2 = None if kind == "AdaSSP" else 1.0
    torch.testing.assert_close(_delta(where, solution(released, l2)), _flat(expected.solve(l2)))


def test_a_ridge_that_determines_nothing_leaves_the_anchor() -> None:
    model, where, public, private = _setting(4, 5)
    bounds = bounds_of(public, 0.5)
    sums = clipped_sums(private.rows, private.residuals, bounds)
    sums = {name: torch.zeros_like(value) for name, value in sums.items()}
    privacy = Privacy(delta=1e-3, noise_multiplier=1e-9, seed=3)
    start, shares = model.delta_dict(), SHARES["noisy H"]
    released = release(sums, N, start, where, privacy, bounds, shares)
    assert not any(part.any() for part in solution(released, 0.0))


def test_logits_in_coordinates_are_the_tangent_model_s() -> None:
    model, where, _, private = _setting(4, 5)
    draw = torch.Generator().manual_seed(4)
    z = torch.randn(4, generator=draw, dtype=torch.float64)
    columns = torch.randn(CLASSES, 5, generator=draw, dtype=torch.float64)
    model.load_delta_dict(where.deltas(z, columns))  # pyright: ignore[reportArgumentType]
    expected = model(samples().tensors[0])
    torch.testing.assert_close(private.logits(z, columns), expected.detach())


def _cored() -> tuple[Net, nn.Module]:
    anchor, basis = anchored()
    return anchor, ordinary_core(anchor, basis)


def test_the_ordinary_core_has_the_tangent_model_as_its_derivative() -> None:
    anchor, model = _cored()
    inputs = samples().tensors[0]
    torch.testing.assert_close(model(inputs), anchor(inputs))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"body.core.weight", "head.weight", "head.bias"}
    draw = torch.Generator().manual_seed(4)
    moves = {
        name: torch.randn(value.shape, generator=draw, dtype=torch.float64)
        for name, value in trained.items()
    }
    _, derivative = jvp(
        lambda values: functional_call(model, values, (inputs,)), (trained,), (moves,)
    )
    linear = tangent()
    names = {"body.weight": "body.core.weight"}
    for name, delta in linear.deltas().items():
        delta.data.copy_(moves[names.get(name, name)])
    torch.testing.assert_close(derivative, (linear(inputs) - anchor(inputs)).detach())


def test_opacus_trains_the_core_and_the_head_alone() -> None:
    anchor, model = _cored()
    data = CachedFeatures(*samples(40).tensors)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    privacy = Privacy(
        delta=1e-3,
        max_grad_norm=1.0,
        target_epsilon=8.0,
        expected_batch_size=20,
        steps=3,
        seed=0,
    )
    fit_by_opacus(model, data, privacy, 1e-2)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"body.core.weight", "head.weight", "head.bias"}
    # AdamW moves each number by at most about lr in each of the first steps.
    assert float((model.state_dict()["head.bias"] - before["head.bias"]).abs().max()) < 0.04
    assert not model.training
    assert torch.equal(anchor.body.weight, before["body.layer.weight"])


def _given(group: str) -> Given:
    arguments = {
        "group": group,
        "seed": 2,
        "failure": 1e-3,
        "epsilons": [3.0],
        "core": 2,
        "draws": 2,
        "expected": 10,
        "steps": 2,
        "core_directions": [2, 4],
        "head_directions": [3, 5],
    }
    every = [CachedFeatures(*samples(40, seed=seed).tensors) for seed in range(4)]
    return Given(arguments, anchored()[0], *every)  # pyright: ignore[reportArgumentType]


def test_noise_of_a_descent_composes_and_is_not_that_of_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: dict[torch.dtype, set[int]] = {torch.float32: set(), torch.float64: set()}

    def spied(private: Read, privacy: Privacy, clips: Any, *, lr: float, steps: int) -> Any:
        sigma = noise_multiplier_for(3.0, 1e-3, sample_rate=1.0, steps=steps)
        assert privacy.noise_multiplier == pytest.approx(sigma) and privacy.steps == steps
        assert 0 < lr <= 1 and privacy.seed is not None
        seeds[private.residuals.dtype].add(privacy.seed)
        return descend(private, privacy, clips, lr=lr, steps=steps)

    monkeypatch.setattr(private_subspace, "descend", spied)
    found = PublicSubspace(_given("public subspace"))
    found.descents(3.0)
    assert [way["way"] for way in found.ways] == ["descent, head", "descent"]
    assert seeds[torch.float32] == {201, 202}  # choices
    assert seeds[torch.float64] == {200, *(200 + draw for draw in FRESH)}  # released; compared


def test_dp_sgd_is_released_with_other_noise_than_it_was_chosen_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, seeds = _given("probe"), []

    def fitted(given: Given, way: str, basis: Any, privacy: Privacy, lr: float) -> nn.Module:
        seeds.append(privacy.seed)
        return given.anchor

    monkeypatch.setattr(part, "fit_way", fitted)
    part.run_sgd(given)
    assert seeds[-1] == 200 and set(seeds[:-1]) == {201}


def test_repetitions_are_left_out_but_for_the_first() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0], [3.0, 4.0]])
    assert without_repetitions(rows).tolist() == [0, 1, 3]
