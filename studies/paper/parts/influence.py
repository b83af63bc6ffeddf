"""Influence: training images taken out by what they do to others, from strong to hardly any l2."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from studies.paper.cells import Cell
from studies.paper.outcomes import hits, outcome
from studies.paper.parts.context import Context
from studies.paper.tuning import choose, round_
from tangent_ops import CachedFeatures, Influence, LinearizedModel, linearize
from tangent_ops.exact import Problem
from tangent_ops.exact.tangent_kernel import TangentKernel
from tangent_ops.losses import RescaledSquareLoss

PART = "influence"
L2S = (3.0, 10.0, 30.0)  # leave-one-out cross-validation starts with them
PARTS_OF_L2 = (10.0, 1.0, 0.1, 0.01, 0.001)  # of the chosen one; at the last the fit interpolates
WAYS = ("exact", "classical", "left out", "training loss", "random")  # to take images out


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        sets: Of images.
        public: Images of the anchor's classifier, of right classes; no training images.
        train: Training images.
        wrong: Fraction of them whose class is replaced by another.
        validation: Images whose loss is harmed or helped.
        removed: How many are taken out at once, one number to a point of the curve.
        checked: Images left out one by one with a fit to the others, for each l2.
    """

    sets: tuple[str, ...]
    public: int
    train: int
    validation: int
    removed: tuple[int, ...]
    checked: int
    wrong: float = 0.1


@dataclass(frozen=True)
class Judges:
    """Images whose logits are wanted.

    Attributes:
        anchored: The anchor's logits, (M, C).
        across: J(x) Jᵀ to the training images, (M, C, N C).
        targets: (M,).
    """

    anchored: Tensor
    across: Tensor
    targets: Tensor

    def logits(self, weights: Tensor) -> Tensor:
        """(M, C), of the delta Jᵀ w with w (N, C)."""
        return self.anchored + self.across @ weights.flatten()


@dataclass(frozen=True)
class Refits:
    """Fits to any of the training images: the square loss's ridge optimum, solved in float64.

    The gradient of (1/n) Σ (1/C) ‖f - y‖² + (l2/2) ‖Δ‖² vanishes at Δ = Jᵀ w with
    (J Jᵀ + (n l2 C / 2) I) w = y - f(anchor), over the n images that are kept.

    Attributes:
        gram: J Jᵀ of all N, (N C, N C).
        residual: y - f(anchor), (N, C).
    """

    gram: Tensor
    residual: Tensor

    def fit(self, kept: Tensor, l2: float) -> Tensor:
        """w (N, C) of the fit to these images; zeros for the others."""
        classes = self.residual.shape[1]
        rows = (kept[:, None] * classes + torch.arange(classes)).flatten()
        matrix = self.gram[rows][:, rows]
        matrix.diagonal().add_(len(kept) * l2 * classes / 2)
        wanted = self.residual[kept].reshape(-1, 1)
        weights = torch.zeros_like(self.residual)
        weights[kept] = torch.cholesky_solve(wanted, torch.linalg.cholesky(matrix)).view(
            -1, classes
        )
        return weights


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """A cell to each set and seed."""
    given = {"public": sizes.public, "train": sizes.train, "wrong": sizes.wrong}
    given |= {"validation": sizes.validation, "removed": list(sizes.removed)}
    for images in sizes.sets:
        for seed in seeds:
            arguments = {"images": images, **given, "checked": sizes.checked, "seed": seed}
            yield Cell(PART, arguments)


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Choose l2, then study influence at parts of it."""
    prepared, seed = context.prepared(arguments["images"]), arguments["seed"]
    sizes = [arguments[name] for name in ("public", "train", "validation")]
    public, rows, validation = prepared.drawn(seed, sizes)
    generator = torch.Generator().manual_seed(seed)
    classes = len(prepared.classes)
    targets, wrong = mislabelled(prepared.targets[rows], classes, arguments["wrong"], generator)
    train = CachedFeatures(prepared.rows(1, rows).features.double(), targets)
    anchor = context.anchor(arguments["images"], public, "square", seed)
    tangent = linearize(anchor.double())
    # An early score for l2 is not needed: `Influence` sets its own.
    problem = Problem(tangent, train, L2S[0], representation="factors", progress=False)
    began = time.perf_counter()
    influence = Influence(problem)
    chosen = choose(L2S, lambda l2: (-influence.cross_validate([l2])[0].loss, None))
    seconds = time.perf_counter() - began

    kernel = TangentKernel(problem.system)
    anchored = kernel.anchor_logits.cpu()
    study = _Study(
        refits=Refits(kernel.gram.cpu(), _aims(targets, classes) - anchored),
        influence=influence,
        validation=judges(kernel, problem, tangent, prepared.rows(1, validation)),
        tested=judges(kernel, problem, tangent, prepared.tested(1)),
        inputs=prepared.rows(1, validation).features.double(),
        train=Judges(anchored, kernel.gram.cpu().view(len(rows), classes, -1), targets),
        wrong=wrong,
        order=torch.randperm(len(rows), generator=generator),
    )
    strengths = [
        study.at(part, round_(part * chosen.value), arguments["removed"], arguments["checked"])
        for part in PARTS_OF_L2
    ]
    return {
        "choices": {"l2": chosen.told()},
        "wrong_classes": int(wrong.sum()),
        "cross_validation_seconds": seconds,
        "anchor": outcome(study.tested.anchored, study.tested.targets),
        "strengths": strengths,
    }


@dataclass(frozen=True)
class _Study:
    """What all strengths of l2 share; `order` is random."""

    refits: Refits
    influence: Influence
    validation: Judges
    tested: Judges
    inputs: Tensor  # of the validation images
    train: Judges
    wrong: Tensor
    order: Tensor

    def at(self, part: float, l2: float, removed: Iterable[int], checked: int) -> dict[str, Any]:
        """Everything at one l2."""
        influence, judged = self.influence, self.validation
        influence.l2 = l2
        everyone = torch.arange(len(self.order))
        weights = self.refits.fit(everyone, l2)
        before, fitted = judged.logits(weights), self.train.logits(weights)
        began = time.perf_counter()
        exact = _harm(before, influence.change(self.inputs).cpu(), judged.targets)
        seconds = time.perf_counter() - began
        classical = linear_harm(before, influence.classical(self.inputs).cpu(), judged.targets)
        own = _losses(fitted, self.train.targets)
        left_out = _losses(influence.left_out().cpu(), self.train.targets)
        scores = {
            "left out": left_out,
            "self-influence": left_out - own,
            "exact": exact,
            "classical": classical,
            "training loss": own,
            "anchor": _losses(self.train.anchored, self.train.targets),
            "random": self.order.argsort().double(),
        }
        curves = [
            {"count": count, **{way: self._without(scores[way], count, l2) for way in WAYS}}
            for count in removed
        ]
        some = self.order[:checked]
        true = torch.stack([self._true_harm(int(index), l2) for index in some])
        return {
            "part": part,
            "l2": l2,
            "influence_seconds": seconds,
            "training_loss": float(own.mean()),
            "training_accuracy": hits(fitted, self.train.targets),
            "left_out_loss": float(left_out.mean()),
            "whole": self._point(weights),
            "curves": curves,
            "single_harm": [self._sums(scores, point["count"]) for point in curves],
            "auc": {name: roc_auc_score(self.wrong, score) for name, score in scores.items()},
            "exact_error": float((exact[some] - true).abs().max() / true.abs().max()),
            "correlation": {
                "exact": _correlation(exact[some], true),
                "classical": _correlation(classical[some], true),
            },
            "agreement": _correlation(exact, classical),
        }

    def _true_harm(self, index: int, l2: float) -> Tensor:
        """How much the validation loss falls when a fit to the others replaces the fit to all."""
        everyone = torch.arange(len(self.order))
        with_it, without = (
            _losses(self.validation.logits(self.refits.fit(kept, l2)), self.validation.targets)
            for kept in (everyone, everyone[everyone != index])
        )
        return (with_it - without).mean()

    def _without(self, score: Tensor, count: int, l2: float) -> dict[str, Any]:
        """The fit without the images of the highest scores."""
        order = score.argsort(descending=True)
        point = self._point(self.refits.fit(order[count:].sort().values, l2))
        return {**point, "wrong_found": int(self.wrong[order[:count]].sum())}

    def _point(self, weights: Tensor) -> dict[str, Any]:
        judged, tested = self.validation.logits(weights), self.tested.logits(weights)
        return {
            "validation_loss": float(_losses(judged, self.validation.targets).mean()),
            "validation_accuracy": hits(judged, self.validation.targets),
            "test_loss": float(_losses(tested, self.tested.targets).mean()),
            "test": outcome(tested, self.tested.targets),
        }

    def _sums(self, scores: dict[str, Tensor], count: int) -> dict[str, float]:
        """Of single influences on the validation loss, of the images that `exact` takes out."""
        gone = scores["exact"].argsort(descending=True)[:count]
        return {name: float(scores[name][gone].sum()) for name in ("exact", "classical")}


def judges(
    kernel: TangentKernel, problem: Problem, tangent: LinearizedModel, data: CachedFeatures
) -> Judges:
    """The anchor's logits of some images, and their kernel to the training images."""
    entering = problem.present(data.features.double())
    return Judges(entering.logits.double().cpu(), kernel.cross(entering).cpu(), data.targets)


def linear_harm(logits: Tensor, changes: Tensor, targets: Tensor) -> Tensor:
    """By how much the mean loss of the judges falls, to first order in each change (N, M, C).

    The classical influence on a loss is that of the logits times the loss's gradient (Koh, Liang,
    "Understanding Black-box Predictions via Influence Functions", ICML 2017, section 2.2).
    """
    gradient = 2 / logits.shape[1] * (logits - _aims(targets, logits.shape[1]))
    return -torch.einsum("nmc,mc->n", changes, gradient) / len(targets)


def mislabelled(
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


def _harm(logits: Tensor, changes: Tensor, targets: Tensor) -> Tensor:
    """By how much the judges' mean loss falls with each change, (N,)."""
    before = _losses(logits, targets).mean()
    return torch.stack([before - _losses(logits + one, targets).mean() for one in changes])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return RescaledSquareLoss(reduction="none")(logits, targets)


def _aims(targets: Tensor, classes: int) -> Tensor:
    """What the square loss draws the logits to."""
    return RescaledSquareLoss().M * torch.nn.functional.one_hot(targets, classes).double()


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])
