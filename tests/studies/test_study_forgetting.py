"""Forgetting and the attack on it, against training and statistics by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import generator, shaken
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.cells import Found
from studies.paper.outcomes import logits_of, outcome, outcome_of
from studies.paper.parts import forgetting, membership
from studies.paper.parts.dealing import Dealt, fit_ordinary
from studies.paper.parts.forgetting import ENSEMBLE, EXACT, MEANS, ORDINARY, SUMS, Task
from studies.paper.parts.membership import Game
from studies.paper.report import forgetting as forgetting_report
from studies.paper.report import membership as membership_report
from studies.paper.report.summary import auc
from tangent_ops import (
    CachedFeatures,
    core_basis,
    fit,
    fit_exact,
    linearize,
    statistics,
)
from tangent_ops.exact import Problem
from tangent_ops.model.features import Tail

C, SHARDS, TRAIN, TESTED, EPOCHS = 3, 3, 18, 60, 2


def _drawn(count: int, seed: int) -> CachedFeatures:
    """Tokens that say something of the class, and noise."""
    targets = torch.arange(count) % C
    tokens = torch.randn(count, 5, 8, generator=generator(seed))
    return CachedFeatures(tokens + 0.3 * nn.functional.one_hot(targets, 8)[:, None], targets)


@pytest.fixture(scope="module")
def anchor() -> Tail:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": C}
    return Tail(shaken(VisionTransformer(img_size=8, patch_size=4, **options)).eval(), 1)


@pytest.fixture(scope="module")
def task(anchor) -> Task:
    private, parts = _drawn(TRAIN, 1), torch.arange(TRAIN).tensor_split(SHARDS)
    shards = [CachedFeatures(private.features[part], private.targets[part]) for part in parts]
    dealt = Dealt(anchor, _drawn(12, 4), shards, private, _drawn(20, 2), _drawn(TESTED, 3))
    order = torch.tensor([4, 13, 2, 9])
    return Task(dealt, parts, [0, 2], [order[:1], order], EPOCHS, seed=0)


@pytest.fixture(scope="module")
def results(task) -> dict[str, dict[str, Any]]:
    return {name: run(task) for name, run in forgetting.GROUPS.items()}


@pytest.fixture(scope="module")
def game(anchor) -> Game:
    halves = membership.halves_of(24, 4, generator())
    shards = torch.arange(24, 40).tensor_split(2)
    rest = (_drawn(20, 6), _drawn(TESTED, 7))
    return Game(anchor, _drawn(12, 4), _drawn(40, 5), 12, shards, halves, *rest, EPOCHS, seed=0)


@pytest.fixture(scope="module")
def attacks(game) -> dict[str, dict[str, Any]]:
    return {name: run(game) for name, run in membership.GROUPS.items()}


def _kept(task: Task, part: Tensor) -> CachedFeatures:
    """What the last request leaves of some images."""
    gone = set(task.requests[-1].tolist())
    return task.some(torch.tensor([index for index in part.tolist() if index not in gone]))


def _last(results: dict[str, dict[str, Any]], group: str, way: str) -> dict[str, Any]:
    return results[group]["ways"][way]["requests"][-1]["outcome"]


def test_the_mean_after_a_request_is_that_of_shards_trained_without_it(task, results) -> None:
    rate = results["tangent"]["choices"][MEANS]["chosen"]
    tangent = linearize(task.dealt.anchor)
    deltas = []
    for part in task.parts:
        tangent.zero_()
        given: dict[str, Any] = {"lr": rate, "epochs": EPOCHS, "batch_size": 8, "seed": 0}
        loss = forgetting.LOSSES["square"]()
        fit(tangent, _kept(task, part), loss=loss, optimizer="momentum", progress=False, **given)
        deltas.append(tangent.delta_dict())
    mean = {name: sum(delta[name] for delta in deltas) / SHARDS for name in deltas[0]}
    tangent.load_delta_dict(mean)
    assert _last(results, "tangent", MEANS) == outcome_of(tangent, task.dealt.tested)


def test_the_exact_fit_after_a_request_is_the_optimum_of_the_rest(task, results) -> None:
    tangent = linearize(task.dealt.anchor)
    l2 = results["tangent"]["choices"][EXACT]["chosen"]
    rest = _kept(task, torch.arange(TRAIN))
    options: dict[str, Any] = {"representation": "passes", "progress": False}
    fit_exact(Problem(tangent, rest, l2, **options), 1e-6, method="cg")
    assert _last(results, "tangent", EXACT) == outcome_of(tangent, task.dealt.tested)


def test_statistics_after_a_request_are_those_of_the_rest(task, results) -> None:
    core = core_basis(task.dealt.anchor, task.dealt.public, size=forgetting.CORE)
    tangent = linearize(task.dealt.anchor, core=core)
    rest = statistics(tangent, _kept(task, torch.arange(TRAIN)), progress=False)
    tangent.load_delta_dict(rest.choose().delta)
    assert _last(results, "statistics", SUMS) == outcome_of(tangent, task.dealt.tested)


def test_ordinary_models_after_a_request_never_saw_it(task, results) -> None:
    choices, dealt = results["ordinary"]["choices"], task.dealt
    shards = [_kept(task, part) for part in task.parts]
    models = fit_ordinary(dealt.anchor, shards, choices[ENSEMBLE]["chosen"], EPOCHS, 0)
    logits = torch.stack([logits_of(model, dealt.tested) for model in models]).mean(dim=0)
    assert _last(results, "ordinary", ENSEMBLE) == outcome(logits, dealt.tested.targets)
    rest = [_kept(task, torch.arange(TRAIN))]
    model = fit_ordinary(dealt.anchor, rest, choices[ORDINARY]["chosen"], EPOCHS, 0)[0]
    assert _last(results, "ordinary", ORDINARY) == outcome_of(model, dealt.tested)


def test_a_sum_that_keeps_what_was_forgotten_is_noticed(task, monkeypatch) -> None:
    monkeypatch.setattr(forgetting.StatisticsLedger, "forget_samples", lambda *_: None)
    with pytest.raises(AssertionError):
        forgetting.run_statistics(task)


def test_confidences_are_log_odds() -> None:
    logits, targets = torch.randn(6, C, generator=generator()), torch.arange(6) % C
    odds = logits.double().softmax(dim=1)[torch.arange(6), targets]
    torch.testing.assert_close(membership.confidences(logits, targets), (odds / (1 - odds)).log())


def test_likelihood_ratios_are_those_of_normals_with_pooled_variance() -> None:
    shadows = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    inside = torch.zeros(8, 5, dtype=torch.bool)
    for row, half in zip(inside, membership.halves_of(5, 8, generator()), strict=True):
        row[half] = True
    seen = torch.randn(5, generator=generator(1), dtype=torch.float64)
    found = membership.likelihood_ratios(shadows, inside, seen)
    expected = np.zeros(5)
    for sign, chosen in ((1, inside), (-1, ~inside)):
        groups = [shadows[chosen[:, i], i].numpy() for i in range(5)]
        free = sum(len(group) - 1 for group in groups)
        pooled = sum(group.var(ddof=1) * (len(group) - 1) for group in groups) / free
        for i, group in enumerate(groups):
            expected[i] += sign * stats.norm.logpdf(seen[i], group.mean(), pooled**0.5)
    np.testing.assert_allclose(found, expected)


def test_each_candidate_is_in_half_of_the_shadows() -> None:
    halves = membership.halves_of(24, 8, generator())
    assert [len(half) for half in halves] == [12] * 8
    assert torch.cat(halves).bincount().tolist() == [4] * 24


def test_the_attack_sees_members_until_they_are_forgotten(attacks) -> None:
    for group, kind, state in (
        ("tangent", MEANS, "forgotten by the ledger"),
        ("statistics", "statistics", "forgotten by subtraction"),
    ):
        seen = attacks[group]["attacked"]
        forgotten, never = (seen[f"{kind}, {name}"] for name in (state, "never had it"))
        assert forgotten == never
    seen = attacks["tangent"]["attacked"]
    before, after = (
        auc(seen[f"exact, {state}"]["members"], seen[f"exact, {state}"]["others"])
        for state in ("before", "never had it")
    )
    assert before > after + 0.15


def test_ascent_ends_at_the_loss_that_unseen_images_had(game, monkeypatch) -> None:
    monkeypatch.setattr(membership, "ASCENT_RATE", 2e-3)
    shard = game.some(torch.arange(12))
    model = fit_ordinary(game.anchor, [shard], 2e-2, 40, 0)[0]
    ascended = membership.ascend(model, shard, game.validation, 0)

    def loss_of(one: nn.Module, data: CachedFeatures) -> float:
        return float(forgetting.LOSSES["square"]()(logits_of(one, data), data.targets))

    unseen = loss_of(model, game.validation)
    assert loss_of(model, shard) < 0.8 * unseen
    assert unseen <= loss_of(ascended, shard) < 1.1 * unseen


def test_an_attack_at_chance_covers_chance_and_another_does_not() -> None:
    random = np.random.default_rng(0)
    chance = [(random.normal(size=80), random.normal(size=100)) for _ in range(4)]
    seen = membership_report.attack(chance)  # type: ignore[arg-type]
    assert seen.auc_interval[0] < 0.5 < seen.auc_interval[1] and not seen.sees
    good = membership_report.attack([(a + 1, b) for a, b in chance])  # type: ignore[arg-type]
    assert good.sees and good.caught > 0.15 > seen.caught


def test_the_pages_are_made_of_any_results(results, attacks, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(membership_report, "BOOTSTRAPS", 20)
    cells = {}
    for part, sizes, groups in (
        (forgetting, forgetting.Sizes("tiny", 12, TRAIN, 20, SHARDS, (0, 2), (1, 4)), results),
        (membership, membership.Sizes("tiny", 12, 12, 16, 20, 3, 4), attacks),
    ):
        for cell in part.plan(sizes, (0, 1)):
            result = groups[cell.arguments["group"]]
            told = {"part": cell.part, "arguments": cell.arguments, "result": result, "seconds": 1}
            cells[cell.name] = told
    for report in (forgetting_report, membership_report):
        section = report.section(Found(cells), tmp_path)
        assert 5 <= len(section.claims) <= 15 and 2 <= len(section.findings) <= 4
        assert all(path.stat().st_size > 10_000 for path, _ in section.figures)
