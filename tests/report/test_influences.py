"""The loss changes of a report against compositions that were fitted without each image."""

from __future__ import annotations

import pytest
import torch
from report_runs import validation
from torch.utils.data import TensorDataset

from tangent_ops import fit_exact
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.report import influences
from tangent_ops.report.influences import cases, chosen_images, reason_against
from tangent_ops.shards import Plan
from tangent_ops.shards.composing import composition, default_how
from tangent_ops.shards.job import job_data
from tangent_ops.shards.scoring import Predictions, predictions


def traced(plan: Plan) -> tuple[list[influences.Case], torch.Tensor, torch.Tensor]:
    samples = validation(plan)
    how = default_how(plan)
    found = predictions(plan.tangent(), {how: composition(plan, how)}, samples, progress=False)
    made = cases(plan, samples, found, progress=False)
    inputs = torch.stack([samples[case.index][0] for case in made])
    return made, inputs, torch.tensor([case.target for case in made])


def fitted(plan: Plan, data: TensorDataset, l2: float, inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the optimum on some images, solved in float64."""
    tangent = plan.tangent().double()
    fit_exact(Problem(tangent, data, l2, progress=False), 1e-9)
    with torch.no_grad():
        return tangent(inputs.double())


def images_of(plan: Plan, shard: str, but: str | None = None) -> TensorDataset:
    data = job_data(plan, plan.job(shard))
    kept = [index for index, id in enumerate(data.ids) if id != but]
    inputs = torch.stack([data[index][0] for index in kept]).double()
    return TensorDataset(inputs, torch.tensor([data.targets[index] for index in kept]))


def joined(several: list[TensorDataset]) -> TensorDataset:
    return TensorDataset(*(torch.cat([d.tensors[k] for d in several]) for k in (0, 1)))


def check(made, inputs, targets, logits, without) -> None:
    """Loss and two of the changes of each case, one that helped and one that harmed."""
    loss = RescaledSquareLoss(reduction="none")
    before = loss(logits, targets)
    checked = 0
    for place, case in enumerate(made):
        assert case.loss == pytest.approx(float(before[place]), rel=1e-2)
        for one in (case.helpful[:1] + case.harmful[:1]) if place < 2 else []:
            after = loss(without(one), targets)[place]
            assert one.change == pytest.approx(float(after - before[place]), rel=2e-2, abs=2e-4)
            checked += 1
    assert checked >= 2


def test_of_statistics_it_is_the_optimum_on_all_other_images(summed: Plan) -> None:
    made, inputs, targets = traced(summed)
    meta = composition(summed, "statistics").meta
    assert meta is not None
    l2 = float(meta.extra["l2"])
    names = [shard.name for shard in summed.shards()]
    whole = fitted(summed, joined([images_of(summed, name) for name in names]), l2, inputs)

    def without(one: influences.Neighbour) -> torch.Tensor:
        rest = joined([images_of(summed, name, one.sample.id) for name in names])
        return fitted(summed, rest, l2, inputs)

    check(made, inputs, targets, whole, without)


def test_of_exact_fits_it_is_the_mean_of_the_shards(exact: Plan) -> None:
    made, inputs, targets = traced(exact)
    l2 = exact.recipe.l2
    names = [shard.name for shard in exact.shards()]
    each = {name: fitted(exact, images_of(exact, name), l2, inputs) for name in names}

    def without(one: influences.Neighbour) -> torch.Tensor:
        moved = fitted(exact, images_of(exact, one.shard, one.sample.id), l2, inputs)
        return (sum(each.values()) - each[one.shard] + moved) / len(names)

    check(made, inputs, targets, sum(each.values()) / len(names), without)


def test_helpful_images_raise_the_loss_when_they_go(exact: Plan) -> None:
    made, _, _ = traced(exact)
    for case in made:
        for several, sign in ((case.helpful, 1), (case.harmful, -1)):
            changes = [sign * one.change for one in several]
            assert changes == sorted(changes, reverse=True)
            assert all(change > 0 for change in changes)


@pytest.mark.parametrize(
    "wrong, right, expected", [(10, 10, 2), (1, 10, 1), (10, 1, 3), (10, 0, 4), (0, 2, 0)]
)
def test_wrong_and_right_predictions_are_chosen(wrong: int, right: int, expected: int) -> None:
    predicted = torch.tensor([1] * wrong + [0] * right)
    made = Predictions(torch.zeros_like(predicted), 2, {"a": predicted})
    chosen = chosen_images(made, "a")
    assert len(set(chosen)) == len(chosen) == min(4, wrong + right)
    assert sum(index < wrong for index in chosen) == expected


def test_why_there_are_none(stepped: Plan, exact: Plan, monkeypatch) -> None:
    assert "--method exact" in reason_against(stepped)
    samples = validation(stepped)
    found = predictions(stepped.tangent(), {"mean": None}, samples, progress=False)
    with pytest.raises(UnsupportedError, match="trained by steps"):
        cases(stepped, samples, found, progress=False)
    monkeypatch.setattr(influences, "MOST_ROWS", 10)
    assert "use exact.Influence" in reason_against(exact)
    monkeypatch.setattr(influences, "MOST_IMAGES", 10)
    assert "up to 10" in reason_against(exact)
