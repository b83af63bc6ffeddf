"""Part 6: training images taken out by what they do to the validation images' loss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from studies.paper.cells import Cell, Found
from studies.paper.methods import LOW_RANK, probe, with_head
from studies.paper.parts.context import Context, logits_of, score
from studies.paper.presets import Preset
from studies.paper.tokens import FEATURES
from tangent_ops import CachedFeatures, Influence, LinearizedModel, fit_exact, linearize
from tangent_ops.errors import NotConvergedWarning
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss

PART = "influence"
LOSS = "square"
L2S = (3.0, 10.0, 30.0, 100.0)  # leave-one-out cross-validation chooses among them
FIT_TOLERANCE = 0.02


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """A cell to each seed."""
    part = preset.influence
    given = {"images": part.images, "train": part.train, "wrong": part.wrong}
    given |= {"validation": part.validation, "removed": list(part.removed)}
    for seed in preset.seeds:
        yield Cell(PART, {**given, "seed": seed})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Rank the training images by three scores; take the worst of each out, and fit again."""
    prepared = context.prepared(arguments["images"])
    seed, removed = arguments["seed"], arguments["removed"]
    rows, validation = prepared.drawn(seed, [arguments["train"], arguments["validation"]])
    generator = torch.Generator().manual_seed(seed)
    targets, wrong = _mislabelled(
        prepared.targets[rows], len(prepared.classes), arguments["wrong"], generator
    )
    train = CachedFeatures(prepared.rows(1, rows).features, targets)
    judged, tested = prepared.rows(1, validation), prepared.tested(1)

    # The anchor's classifier has seen the wrong classes, too: there is nothing cleaner to be had.
    features = CachedFeatures(prepared.rows(FEATURES, rows).features, targets)
    anchor = with_head(
        context.tail(arguments["images"]), probe(features, len(prepared.classes), LOSS, seed)
    )
    tangent = linearize(anchor, rank=LOW_RANK, basis=0)
    began = time.perf_counter()
    influence = Influence(Problem(tangent, train, L2S[0], progress=False))
    best = min(influence.cross_validate(L2S), key=lambda row: row.loss)
    influence.l2 = best.l2
    scores = {
        "exact": influence.loss_change(judged.features, judged.targets).sum(dim=1).cpu(),
        "classical": _classical(influence, tangent, train, judged, best.l2),
        "random": torch.rand(len(rows), generator=generator, dtype=torch.float64),
    }
    seconds = time.perf_counter() - began
    points = []
    for count in (0, *removed):
        point: dict[str, Any] = {"removed": count}
        for name, harm in scores.items():
            if count == 0 and len(point) > 1:  # nothing is removed: all the same
                point[name] = point["exact"]
                continue
            order = harm.argsort()  # the most harmful first
            gone, kept = order[:count], order[count:].sort().values
            _fit(tangent, CachedFeatures(train.features[kept], train.targets[kept]), best.l2)
            point[name] = {
                "validation_loss": _loss(tangent, judged),
                "validation_accuracy": score(tangent, judged),
                "test_loss": _loss(tangent, tested),
                "test_accuracy": score(tangent, tested),
                "wrong_found": int(wrong[gone].sum()),
            }
        points.append(point)
    agreement = torch.corrcoef(torch.stack([scores["exact"], scores["classical"]]))[0, 1]
    return {
        "points": points,
        "wrong": int(wrong.sum()),
        "l2": best.l2,
        "influence_seconds": seconds,
        "correlation": float(agreement),
        "exact_over_classical": float((scores["exact"] / scores["classical"]).median()),
    }


def _classical(
    influence: Influence,
    tangent: LinearizedModel,
    train: CachedFeatures,
    judged: CachedFeatures,
    l2: float,
) -> Tensor:
    """The change of the validation loss by the classical influence function, summed; (N,)."""
    _fit(tangent, train, l2)
    logits = logits_of(tangent, judged).double()
    moved = influence.classical(judged.features).cpu()  # (N, M, C)
    loss = RescaledSquareLoss(reduction="sum")
    before = loss(logits, judged.targets)
    return torch.stack([loss(logits + change, judged.targets) - before for change in moved])


def _fit(tangent: LinearizedModel, data: CachedFeatures, l2: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        fit_exact(Problem(tangent, data, l2, progress=False), FIT_TOLERANCE)


def _loss(tangent: LinearizedModel, data: CachedFeatures) -> float:
    return float(RescaledSquareLoss()(logits_of(tangent, data), data.targets))


def _mislabelled(
    targets: Tensor, classes: int, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Targets, some of them moved to another class, and which."""
    wrong = torch.zeros(len(targets), dtype=torch.bool)
    chosen = torch.randperm(len(targets), generator=generator)[: round(fraction * len(targets))]
    wrong[chosen] = True
    moved = targets.clone()
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    moved[chosen] = (moved[chosen] + shift) % classes
    return moved, wrong
