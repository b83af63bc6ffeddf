"""Audits of `fit_private`, and the canary that they use."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from refusals import refused
from small_models import generator
from torch import nn
from torch.utils.data import TensorDataset

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, DeltaError
from tangent_ops.privacy.auditing.audit_fit import audit_fit
from tangent_ops.privacy.auditing.canary import canary_score, make_canary
from tangent_ops.privacy.fit import fit_private
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.per_sample import gradients

DELTA = 1e-5


def problem(others: int = 8, **options):
    """A small tangent model, data for it, and a canary's input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))
    noise = generator(1)
    inputs = torch.randn(others, 6, generator=noise)
    residuals = torch.randn(others, 3, generator=noise) * torch.tensor([0.0, 1.0, 1.0])
    with torch.no_grad():
        data = TensorDataset(inputs, model(inputs) + residuals)
    return linearize(model, **options), data, torch.randn(1, 6, generator=noise)


def gradient(tangent, inputs, target) -> dict[str, torch.Tensor]:
    """The gradient of the square loss at w0 by torch.func, in float64."""
    anchor = tangent.anchor.double()
    weights = {n: p.detach() for n, p in anchor.named_parameters()}

    def loss(weights):
        output = torch.func.functional_call(anchor, weights, (inputs.double(),))
        return (output - target.double()).square().mean()

    return torch.func.grad(loss)(weights)


def length(parts) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def test_a_canary_has_the_gradient_that_was_asked_for() -> None:
    tangent, _, inputs = problem()
    same, target = make_canary(tangent, inputs, 700.0)
    assert same is inputs
    found = gradient(tangent, inputs, target)
    assert length(found.values()) == pytest.approx(700, rel=1e-4)  # float32
    off = (target - tangent.anchor(inputs.double())).abs()[0]
    assert off[0] > 1 and off[1:].max() < 1e-5


@pytest.mark.parametrize("rank", [None, 2])
def test_the_score_is_the_part_along_the_gradient(rank: int | None) -> None:
    tangent, _, inputs = problem(rank=rank)
    _, target = make_canary(tangent, inputs, 50.0)
    score = canary_score(tangent, inputs, target, nn.MSELoss())
    bases = {name: basis.double() for name, basis in tangent.basis.tensors().items()}
    right = gradient(tangent, inputs, target)
    right = {n: g @ bases[n].T if n in bases else g for n, g in right.items()}
    size = length(right.values())
    assert score({name: -part for name, part in right.items()}) == pytest.approx(size, rel=1e-5)
    delta = {name: torch.randn(part.shape, generator=generator(4)) for name, part in right.items()}
    along = sum(float((delta[name] * part).sum()) for name, part in right.items())
    assert score(delta) == pytest.approx(-along / size, rel=1e-5)
    refused(DeltaError, "missing", score, {})


def test_the_score_does_not_depend_on_the_models_deltas() -> None:
    tangent, _, inputs = problem()
    canary = make_canary(tangent, inputs, 50.0)
    delta = {name: torch.ones_like(part) for name, part in tangent.deltas().items()}
    before = canary_score(tangent, *canary, nn.MSELoss())(delta)
    tangent.load_delta_dict(delta)
    assert canary_score(tangent, *canary, nn.MSELoss())(delta) == before
    assert torch.equal(make_canary(tangent, inputs, 50.0)[1], canary[1])


def test_bad_canaries_are_refused() -> None:
    tangent, _, inputs = problem()
    with pytest.raises(ArgumentError, match=r"one sample, of shape \(1, ...\), got shape \(2, 6\)"):
        make_canary(tangent, inputs.repeat(2, 1), 1.0)
    refused(ArgumentError, "gradient_norm must be positive", make_canary, tangent, inputs, 0.0)
    with pytest.raises(ArgumentError, match="canary's gradient has norm 0"):
        with torch.no_grad():
            target = tangent(inputs)
        canary_score(tangent, inputs, target, nn.MSELoss())
    nn.init.zeros_(tangent.anchor.get_parameter("2.weight"))
    headless = linearize(tangent.anchor, r"^0\.", check=False)
    refused(ArgumentError, "gradient of inputs is zero", make_canary, headless, inputs, 1.0)


def test_the_canary_gives_itself_away_as_much_as_analysis_assumes() -> None:
    """With negligible noise, the canary moves the score by lr C / E in each step."""
    tangent, data, inputs = problem()
    inputs, target = make_canary(tangent, inputs, 2000.0)
    score = canary_score(tangent, inputs, target, nn.MSELoss())
    pairs = zip(data.tensors, (inputs, target), strict=True)
    scores = []
    for samples in (data, TensorDataset(*(torch.cat(pair) for pair in pairs))):
        done = fit_private(
            problem()[0],
            samples,
            Privacy(
                delta=1e-3,
                max_grad_norm=2.0,
                noise_multiplier=1e-3,
                expected_batch_size=len(samples),
                steps=5,
                seed=0,
            ),
            loss=nn.MSELoss(),
            lr=1e-5 * len(samples),
            optimizer="sgd",
            progress=False,
        )
        scores.append(score(done.delta))
    assert scores[1] - scores[0] == pytest.approx(5 * 1e-5 * 2.0, rel=0.01)


PRIVACY = Privacy(delta=DELTA, max_grad_norm=0.5, noise_multiplier=1.0, steps=4, seed=0)
FIT = {"privacy": PRIVACY, "lr": 0.1, "progress": False}
SAMPLED = {**FIT, "sample_rate": 0.5}
ALL = {**FIT, "sample_rate": 1.0}


def test_fit_private_is_what_it_claims() -> None:
    tangent, data, inputs = problem()
    found = audit_fit(tangent, data, inputs, runs=80, **ALL)
    assert found.consistent
    assert 0.1 * found.claimed < found.family_lower_bound <= found.claimed
    assert not any(delta.any() for delta in tangent.deltas().values())


def test_fits_with_and_without_the_canary_differ_in_nothing_else(monkeypatch) -> None:
    asked = []

    def spy(tangent, dataset, privacy, **options):
        asked.append({"samples": len(dataset), **vars(privacy), **options})
        return fit_private(tangent, dataset, privacy, **options)

    # The package exports a function of the same name, which hides the module.
    module = importlib.import_module("tangent_ops.privacy.auditing.audit_fit")
    monkeypatch.setattr(module, "fit_private", spy)
    found = audit_fit(*problem(), runs=40, **SAMPLED)
    assert found.consistent and found.family_lower_bound <= found.claimed
    assert sorted(one["samples"] for one in asked) == [8] * 20 + [9] * 21  # one for the claim
    assert len({one["seed"] for one in asked}) == 41
    for one in asked:
        assert one["expected_batch_size"] / one["samples"] == pytest.approx(0.5)
        assert one["lr"] / one["expected_batch_size"] == pytest.approx(0.1 / 4.5)
        assert (one["max_grad_norm"], one["noise_multiplier"], one["optimizer"]) == (0.5, 1, "sgd")


def test_halved_noise_is_caught(monkeypatch) -> None:
    own = NoiseSource.normal
    monkeypatch.setattr(
        NoiseSource, "normal", lambda self, shape, std, *rest: own(self, shape, std / 2, *rest)
    )
    found = audit_fit(*problem(), runs=120, **ALL)
    assert not found.consistent
    assert found.noise_ratio is not None and found.noise_ratio < 0.95


def test_skipped_clipping_is_caught(monkeypatch) -> None:
    monkeypatch.setattr(gradients, "clip_factors", lambda norms, _: torch.ones_like(norms))
    found = audit_fit(*problem(), runs=60, **SAMPLED)
    assert not found.consistent
    assert (found.tpr, found.fpr) == (pytest.approx(15 / 16, abs=0.15), 0)


BAD_FITS = {
    r"sample_rate must be from 1/8 .* got 0.1": {"sample_rate": 0.1},
    "runs must be even": {"runs": 41},
    r"give Privacy\(max_grad_norm=\)": {"privacy": replace(PRIVACY, max_grad_norm=None)},
    "loss is not an option of an audit": {"loss": nn.MSELoss()},
    "audit_fit does not use start": {"privacy": replace(PRIVACY, start="public")},
}


@pytest.mark.parametrize(("message", "wrong"), BAD_FITS.items(), ids=BAD_FITS)
def test_bad_options_of_fits_are_refused(message: str, wrong: dict) -> None:
    refused(ArgumentError, message, audit_fit, *problem(), **{**SAMPLED, **wrong})
