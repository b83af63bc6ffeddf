"""The training images that helped and harmed a run's predictions most, by exact influence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.composition.ledger import StatisticsLedger
from tangent_ops.composition.ridge import Ridge
from tangent_ops.delta import load_delta
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact import Influence
from tangent_ops.exact.collect import feature_rows
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards import Job, Plan, Samples, settled_ledger
from tangent_ops.shards.composing import composition, default_how
from tangent_ops.shards.job import device, job_data, job_problem
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.scoring import Predictions

CASES = 4  # images whose predictions are traced back
TOP = 6  # training images that helped, and that harmed
MOST_IMAGES = 5_000  # of all shards; each is read once, and run backwards once for each class
MOST_ROWS = 4_000  # images times classes of an exactly fitted shard; the cost grows by their cube
MOST_FEATURES = 1 << 27  # numbers of the images' Jacobians in a core; 1 GiB


@dataclass(frozen=True)
class Neighbour:
    """A training image, and what leaving it out does.

    Attributes:
        shard: its shard.
        sample: the image.
        change: of the other image's loss when this one is left out; positive: it helped.
        picture: data URI; "" until it is added.
    """

    shard: str
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


def reason_against(plan: Plan) -> str:
    """Why a run's influences are not computed, with the way out; "" if they can be."""
    recipe = plan.recipe
    if recipe.method == "gradient":
        return (
            "An exact influence is that on an optimum, and shards that were trained by steps are "
            "not at theirs: finetune --method exact, or statistics, gives optima."
        )
    if recipe.loss != "rsl":
        return (
            f"Exact influence needs a quadratic loss, and this run's is {recipe.loss}: "
            "finetune --loss rsl."
        )
    if plan.overlap:
        return "Influences are computed for images that are in one shard each."
    classes = plan.anchor_info.options["num_classes"]
    done = [shard.samples for shard in plan.shards() if shard.done]
    rows = max(done, default=0) * classes
    if sum(done) > MOST_IMAGES:
        return (
            f"The run has {sum(done):,} images; a report computes influences of up to "
            f"{MOST_IMAGES:,}. In Python, exact.Influence and Ridge.changes have no such limit."
        )
    if recipe.method == "exact" and rows > MOST_ROWS:
        return (
            f"The largest shard has {rows:,} images times classes; a report computes influences "
            f"of up to {MOST_ROWS:,}, as the cost grows by their cube: use exact.Influence in "
            "Python, or finetune --method statistics, whose cost does not."
        )
    if plan.basis is not None and sum(done) * classes * plan.basis.directions > MOST_FEATURES:
        return (
            f"The Jacobians of {sum(done):,} images in {plan.basis.directions} directions are "
            "more than a report keeps in memory: use Ridge.changes in Python."
        )
    return ""


def cases(plan: Plan, data: Samples, found: Predictions, progress: bool = True) -> list[Case]:
    """Trace the predictions of some labelled images back to training images.

    "Without an image" is the mean of the shards, of which one was fitted without that image, with
    the weights that they then have; with the method "statistics" it is the optimum on all others
    with the same l2.

    Args:
        plan: a settled run, of which `reason_against` says nothing.
        data: labelled images, prepared for the anchor.
        found: what the run's models predict for them.
        progress: show bars.

    Raises:
        UnsupportedError: the run's method has no exact influence.
        SampleError: an image of the run or of data cannot be read, or has changed.
    """
    if reason := reason_against(plan):
        raise UnsupportedError(reason)
    how = default_how(plan)
    chosen = chosen_images(found, how)
    tangent = plan.tangent().to(device())
    inputs = torch.stack([data[index][0] for index in chosen])
    targets = found.targets[chosen]
    main = composition(plan, how)
    tangent.load_delta_dict(main)
    logits = _logits(tangent, inputs.to(device()))
    jobs = [plan.job(shard.name) for shard in plan.shards() if shard.done]
    ledger = settled_ledger(plan)
    if isinstance(ledger, StatisticsLedger):
        assert main.meta is not None
        l2 = float(main.meta.extra["l2"])
        changes = _of_statistics(plan, tangent, ledger, jobs, (inputs, targets), l2, progress)
    else:
        changes = _of_mean(plan, tangent, jobs, inputs, progress)
    names = [(job.shard, sample) for job in jobs for sample in job.samples]
    loss = RescaledSquareLoss(reduction="none")
    result = []
    for place, index in enumerate(chosen):
        target = targets[place : place + 1]
        before = float(loss(logits[place : place + 1], target))
        after = loss(logits[place] + changes[:, place], target.expand(len(changes)))
        scores = (after - before).tolist()
        order = sorted(range(len(scores)), key=lambda one: -scores[one])
        neighbours = [Neighbour(*names[one], scores[one]) for one in order]
        result.append(
            Case(
                index=index,
                target=int(target),
                predicted=int(found.classes[how][index]),
                loss=before,
                helpful=[one for one in neighbours[:TOP] if one.change > 0],
                harmful=[one for one in neighbours[::-1][:TOP] if one.change < 0],
            )
        )
    return result


def chosen_images(found: Predictions, name: str) -> list[int]:
    """Indices of images to trace back: wrong ones as far as there are, half of them at most."""
    right = found.right(name)
    wrong = (~right).nonzero()[:, 0].tolist()
    fine = right.nonzero()[:, 0].tolist()
    some = _evenly(wrong, min(len(wrong), max(CASES // 2, CASES - len(fine))))
    return some + _evenly(fine, min(len(fine), CASES - len(some)))


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def _of_mean(
    plan: Plan,
    tangent: LinearizedModel,
    jobs: list[Job],
    inputs: Tensor,
    progress: bool,
) -> Tensor:
    """(N, M, C): the changes of the mean's logits.

    With weights w_s, W their sum and t_s the outputs of the shards' deltas, the mean is
    T = Σ w_s t_s / W, and without an image of s it is (W T - w_s t_s + w (t_s + change)) / (W - w_s
    + w) with w the weight that s then has.
    """
    counts = {job.shard: float(len(job.samples)) for job in jobs}
    by_size = plan.weights == "samples"
    weights = counts if by_size else dict.fromkeys(counts, 1.0)
    whole = sum(weights.values())
    inputs = inputs.to(device())
    tangent.zero_()
    anchored = _logits(tangent, inputs)
    moves, changes = {}, {}
    bar = tqdm(jobs, "influence", unit="shard", delay=2, leave=False, disable=not progress)
    for job in bar:
        path = plan.result_path(job.hash)
        tangent.load_delta_dict(load_delta(path, anchor=plan.anchor_info.fingerprint))
        moves[job.shard] = _logits(tangent, inputs) - anchored
        if len(job.samples) == 1:  # the shard goes with its only image
            changes[job.shard] = torch.zeros(1, *anchored.shape, dtype=torch.float64)
        else:
            problem = job_problem(tangent, job_data(plan, job), plan.recipe, progress=False)
            changes[job.shard] = Influence(problem).change(inputs).cpu()
    mean = sum(weights[name] * move for name, move in moves.items()) / whole
    parts = []
    for name, move in moves.items():
        own = weights[name]
        left = own - 1 if by_size or counts[name] == 1 else own
        rest = whole - own + left
        moved = whole * mean - own * move + left * (move + changes[name])
        parts.append((moved / rest if rest else torch.zeros_like(moved)) - mean)
    return torch.cat(parts)


@torch.no_grad()
def _logits(tangent: LinearizedModel, inputs: Tensor) -> Tensor:
    return tangent.eval()(inputs).double().cpu()


def _of_statistics(
    plan: Plan,
    tangent: LinearizedModel,
    ledger: StatisticsLedger,
    jobs: list[Job],
    labelled: tuple[Tensor, Tensor],
    l2: float,
    progress: bool,
) -> Tensor:
    """(N, M, C): the changes of the optimum's logits."""
    samples = tuple(sample for job in jobs for sample in job.samples)
    union = job_data(plan, replace(jobs[0], samples=samples))
    rows, residuals = feature_rows(tangent, union, progress=progress)
    others, _ = feature_rows(tangent, TensorDataset(*labelled), progress=False)
    ridge = Ridge(ledger.statistics())
    return ridge.changes(_on_cpu(rows), residuals.cpu(), _on_cpu(others), l2)


def _on_cpu(rows: FeatureRows) -> FeatureRows:
    return FeatureRows(rows.outputs.cpu(), rows.core.cpu(), rows.head.cpu())
