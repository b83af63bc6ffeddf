"""`cases`: some of a run's predictions, and the training images that helped and harmed them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tangent_ops.errors import UnsupportedError
from tangent_ops.shards import Plan, Samples
from tangent_ops.shards.composing import default_how
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.run_influence import check, influences
from tangent_ops.shards.scoring import Predictions

CASES = 4  # images whose predictions are traced back
TOP = 6  # training images that helped, and that harmed
MOST_IMAGES = 5_000  # of all shards; each is read once, and run backwards once for each class
MOST_ROWS = 4_000  # images times classes of an exactly fitted shard; the cost grows by their cube


@dataclass(frozen=True)
class Neighbour:
    """A training image, and what leaving it out does.

    Attributes:
        shards: those that have it.
        sample: the image.
        change: of the other image's loss when this one is left out; positive: it helped.
        picture: data URI; "" until it is added.
    """

    shards: tuple[str, ...]
    sample: Sample
    change: float
    picture: str = ""


@dataclass(frozen=True)
class Case:
    """An image, its prediction, and the training images with the largest influence on its loss.

    Attributes:
        index: of the image in the labelled data.
        target: its class index.
        predicted: the predicted one.
        loss: of the composition at this image.
        helpful: their loss changes, the largest first.
        harmful: the most negative first.
    """

    index: int
    target: int
    predicted: int
    loss: float
    helpful: list[Neighbour]
    harmful: list[Neighbour]


def cases(plan: Plan, data: Samples, found: Predictions, progress: bool = True) -> list[Case]:
    """Trace the predictions of some labelled images back to training images, by `influences`.

    Args:
        plan: a settled run.
        data: labelled images, prepared for the anchor.
        found: what the run's models predict for them.
        progress: show bars.

    Raises:
        UnsupportedError: the run is larger than a report traces; or as in `influences`.
        ArgumentError, StatisticsError: as in `influences`.
        SampleError: an image of the run or of data cannot be read, or has changed.
    """
    how = default_how(plan)
    check(plan, how)
    _check_size(plan)
    chosen = chosen_images(found, how)
    inputs = torch.stack([data[index][0] for index in chosen])
    traced = influences(plan, inputs, found.targets[chosen], progress=progress)
    result = []
    for place, index in enumerate(chosen):
        scores = traced.changes[:, place].tolist()
        order = sorted(range(len(scores)), key=lambda one: -scores[one])
        ranked = [Neighbour(traced.shards[i], traced.samples[i], scores[i]) for i in order]
        result.append(
            Case(
                index=index,
                target=int(found.targets[index]),
                predicted=int(found.classes[how][index]),
                loss=float(traced.losses[place]),
                helpful=[one for one in ranked[:TOP] if one.change > 0],
                harmful=[one for one in ranked[::-1][:TOP] if one.change < 0],
            )
        )
    return result


def _check_size(plan: Plan) -> None:
    done = [shard.samples for shard in plan.shards() if shard.done]
    rows = max(done, default=0) * plan.anchor_info.options["num_classes"]
    if sum(done) > MOST_IMAGES:
        raise UnsupportedError(
            f"the run has {sum(done):,} images; a report computes influences of up to "
            f"{MOST_IMAGES:,}, and `tangent-ops influence` has no such limit"
        )
    if plan.recipe.method == "exact" and rows > MOST_ROWS:
        raise UnsupportedError(
            f"the largest shard has {rows:,} images times classes; a report computes influences "
            f"of up to {MOST_ROWS:,}, as the cost grows by their cube: use `tangent-ops influence`,"
            " or finetune --method statistics, whose cost does not"
        )


def chosen_images(found: Predictions, name: str) -> list[int]:
    """Indices of images to trace back: wrong ones as far as there are, half of them at most."""
    right = found.right(name)
    wrong = (~right).nonzero()[:, 0].tolist()
    fine = right.nonzero()[:, 0].tolist()
    some = _evenly(wrong, min(len(wrong), max(CASES // 2, CASES - len(fine))))
    return some + _evenly(fine, min(len(fine), CASES - len(some)))


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
