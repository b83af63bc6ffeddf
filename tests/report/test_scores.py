"""Predictions of each model, and without each shard, against models evaluated one by one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from report_runs import validation

from tangent_ops.errors import ArgumentError
from tangent_ops.report.scores import scores
from tangent_ops.shards import Plan, compositions, forget, settle
from tangent_ops.shards.composing import compose_run, composition, default_how
from tangent_ops.shards.scoring import Predictions, predictions


def alone(plan: Plan, delta) -> torch.Tensor:
    """What a model predicts for the validation images, one image at a time."""
    samples = validation(plan)
    tangent = plan.tangent().eval()
    if delta is not None:
        tangent.load_delta_dict(delta)
    with torch.no_grad():
        rows = [tangent(samples[index][0][None])[0] for index in range(len(samples))]
    return torch.stack(rows).argmax(dim=1)


@pytest.mark.parametrize("run", ["exact", "summed"])
def test_each_model_and_each_shard_left_out(run, request, tmp_path: Path) -> None:
    plan = request.getfixturevalue(run)
    samples = validation(plan)
    found = scores(plan, samples, composed=True, progress=False)
    how = default_how(plan)
    assert (found.main, found.largest) == (how, False)
    for name, delta in compositions(plan).items():
        assert torch.equal(found.models.classes[name], alone(plan, delta)), name
    assert found.without is not None
    assert list(found.without.classes) == [shard.name for shard in plan.shards()]
    moved = 0
    for name, classes in list(found.without.classes.items())[1:]:
        shutil.copytree(plan.path, tmp_path / name)
        less = Plan.open(tmp_path / name)
        forget(less, shard=name, progress=False)
        settle(less)
        if how == "statistics":
            compose_run(less, how, progress=False)
        assert torch.equal(classes, alone(less, composition(less, how))), name
        moved += int((classes != found.models.classes[how]).sum())
    assert moved > 0  # otherwise any shard could be left out


def test_a_run_that_is_not_composed_has_its_anchor(stepped: Plan) -> None:
    samples = validation(stepped)
    found = scores(stepped, samples, composed=False, progress=False)
    assert (list(found.models.classes), found.main, found.without) == (["anchor"], "anchor", None)


def test_numbers_of_predictions_counted_by_hand() -> None:
    made = Predictions(
        torch.tensor([0, 0, 1, 1, 2]),
        4,
        {"a": torch.tensor([0, 1, 1, 1, 0]), "b": torch.tensor([0, 0, 0, 1, 0])},
    )
    assert made.accuracy("a") == pytest.approx((0.6, math.sqrt(0.6 * 0.4 / 5)))
    # Of b over a: right, wrong and three times the same.
    gain, error = made.gain("b", "a")
    assert (gain, error) == pytest.approx((0.0, math.sqrt(2 / 5 / 5)))
    assert made.totals().tolist() == [2, 2, 1, 0]
    assert made.correct_by_class("b").tolist() == [2, 1, 0, 0]
    expected = [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert made.confusion("a").tolist() == expected


def test_a_class_that_the_model_does_not_know(stepped: Plan) -> None:
    images = torch.utils.data.TensorDataset(torch.zeros(1, 3, 32, 32), torch.tensor([4]))
    with pytest.raises(ArgumentError, match="class 4, and the model knows 4"):
        predictions(stepped.tangent(), {"anchor": None}, images, progress=False)
