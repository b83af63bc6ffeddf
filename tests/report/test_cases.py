"""The loss changes of a report against compositions that were fitted without each image."""

from __future__ import annotations

import pytest
import torch
from report_runs import validation
from shard_runs import create_plan, trained
from torch.utils.data import TensorDataset

from tangent_ops import fit_exact
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.report import cases as module
from tangent_ops.report.cases import Case, Neighbour, cases, chosen_images
from tangent_ops.shards import ImageData, Plan, ShardRecipe, settle
from tangent_ops.shards.composing import composition, default_how
from tangent_ops.shards.job import job_data
from tangent_ops.shards.scoring import Predictions, predictions


def traced(plan: Plan) -> tuple[list[Case], torch.Tensor, torch.Tensor]:
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

    def without(one: Neighbour) -> torch.Tensor:
        rest = joined([images_of(summed, name, one.sample.id) for name in names])
        return fitted(summed, rest, l2, inputs)

    check(made, inputs, targets, whole, without)


def without_in_mean(plan: Plan, inputs: torch.Tensor):
    """The logits of the mean, and a function that fits and weights the shards without an image."""
    names = [shard.name for shard in plan.shards()]

    def mean(but: str | None = None) -> torch.Tensor:
        each, weights = [], []
        for name in names:
            if left := [one.id for one in plan.job(name).samples if one.id != but]:
                each.append(fitted(plan, images_of(plan, name, but), plan.recipe.l2, inputs))
                weights.append(len(left) if plan.weights == "samples" else 1)
        return sum(w * one for w, one in zip(weights, each, strict=True)) / sum(weights)

    return mean(), lambda one: mean(one.sample.id)


def test_of_exact_fits_it_is_the_mean_of_the_shards(exact: Plan) -> None:
    made, inputs, targets = traced(exact)
    check(made, inputs, targets, *without_in_mean(exact, inputs))


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_weights_and_a_shard_of_one_image(folder, exact, weights, monkeypatch) -> None:
    ids = ImageData(str(folder / "images")).open().ids
    dealt = {"one": ids[:1], "some": ids[1:5] + ids[12:15]}
    recipe = ShardRecipe(method="exact", l2=0.5)
    given = {"recipe": recipe, "validation": ImageData(str(folder / "test"))}
    plan = trained(create_plan(folder, dealt, f"weighted-{weights}", **given))
    settle(plan, weights=weights)
    monkeypatch.setattr(module, "TOP", 8)
    made, inputs, targets = traced(plan)
    found = [one for case in made[:2] for one in case.helpful + case.harmful]
    assert len({one.sample.id for one in found}) == 8
    logits, without = without_in_mean(plan, inputs)
    check(made, inputs, targets, logits, without)
    alone = next(one for one in made[0].helpful + made[0].harmful if one.shards == ("one",))
    loss = RescaledSquareLoss(reduction="none")
    expected = (loss(without(alone), targets) - loss(logits, targets))[0]
    assert alone.change == pytest.approx(float(expected), rel=2e-2, abs=2e-4)


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
    def refused(plan: Plan, words: str) -> None:
        found = predictions(plan.tangent(), {"mean": None}, validation(plan), progress=False)
        with pytest.raises(UnsupportedError, match=words):
            cases(plan, validation(plan), found, progress=False)

    refused(stepped, "trained by steps .* begin a run with --method exact")
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    refused(exact, "use `tangent-ops influence`")
    monkeypatch.setattr(module, "MOST_IMAGES", 10)
    refused(exact, "up to 10,")
