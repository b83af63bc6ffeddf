"""Influence: training images taken out by what they do to others, from strong to hardly any l2."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from studies.paper.cells import Cell
from studies.paper.outcomes import hits, outcome
from studies.paper.parts.context import Context
from studies.paper.tuning import choose, round_
from tangent_ops import CachedFeatures, Influence, linearize
from tangent_ops.exact import Problem
from tangent_ops.exact.tangent_kernel import TangentKernel
from tangent_ops.losses import RescaledSquareLoss

PART = "influence"
L2S = (10.0, 30.0, 90.0)  # leave-one-out cross-validation starts with them
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

    def losses(self, logits: Tensor) -> Tensor:
        """Of each, (M,), with these logits."""
        return RescaledSquareLoss(reduction="none")(logits, self.targets)

    @property
    def aims(self) -> Tensor:
        """What the square loss draws the logits to, (M, C)."""
        classes = self.anchored.shape[1]
        return RescaledSquareLoss().M * nn.functional.one_hot(self.targets, classes).double()


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
        weights = torch.zeros_like(self.residual)
        weights[kept] = self.solve(self.residual[kept], kept, l2)
        return weights

    def classical_harm(self, weights: Tensor, judged: Judges, l2: float) -> Tensor:
        """By how much the judges' mean loss falls without each image, to first order; (N,).

        Of the fit to all, w. Source: Koh, Liang, "Understanding Black-box Predictions via
        Influence Functions", ICML 2017, section 2.2.
        """
        count, classes = judged.anchored.shape
        gradient = 2 / (classes * count) * (judged.logits(weights) - judged.aims)
        pulled = (gradient.flatten() @ judged.across.flatten(0, 1)).view(weights.shape)
        everyone = torch.arange(len(weights))
        # The residual y - f of the fit is N l2 C / 2 w.
        errors = len(weights) * l2 * classes / 2 * weights
        return (self.solve(pulled, everyone, l2) * errors).sum(dim=1)

    def solve(self, wanted: Tensor, kept: Tensor, l2: float) -> Tensor:
        """(J Jᵀ + (n l2 C / 2) I)⁻¹ of (n, C), over the images that are kept."""
        classes = wanted.shape[1]
        rows = (kept[:, None] * classes + torch.arange(classes)).flatten()
        matrix = self.gram[rows][:, rows]
        matrix.diagonal().add_(len(kept) * l2 * classes / 2)
        factor = torch.linalg.cholesky(matrix)
        return torch.cholesky_solve(wanted.reshape(-1, 1), factor).view(wanted.shape)


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
    train = CachedFeatures(prepared.rows(1, rows).features, targets)
    anchor = context.anchor(arguments["images"], public, "square", seed)
    tangent = linearize(anchor)
    problem = Problem(tangent, train, L2S[0], representation="factors", progress=False)
    began = time.perf_counter()
    influence = Influence(problem)
    chosen = choose(L2S, lambda l2: (-influence.cross_validate([l2])[0].loss, None))
    seconds = time.perf_counter() - began

    kernel = TangentKernel(problem.system)
    own = Judges(
        kernel.anchor_logits.cpu(), kernel.gram.cpu().view(len(rows), classes, -1), targets
    )
    judged = prepared.rows(1, validation)
    study = _Study(
        refits=Refits(kernel.gram.cpu(), own.aims - own.anchored),
        influence=influence,
        train=own,
        validation=judges(kernel, problem, judged),
        inputs=judged.features,
        tested=judges(kernel, problem, prepared.tested(1)),
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
    """What all weights of the penalty share."""

    refits: Refits
    influence: Influence
    train: Judges
    validation: Judges
    inputs: Tensor  # of the validation images
    tested: Judges
    wrong: Tensor
    order: Tensor  # random

    def at(self, part: float, l2: float, removed: Iterable[int], checked: int) -> dict[str, Any]:
        """Everything at one l2."""
        self.influence.l2 = l2
        weights = self.refits.fit(torch.arange(len(self.order)), l2)
        began = time.perf_counter()
        exact = self._harms(weights, self.influence.change(self.inputs).cpu())
        seconds = time.perf_counter() - began
        classical = self.refits.classical_harm(weights, self.validation, l2)
        fitted = self.train.logits(weights)
        own = self.train.losses(fitted)
        left_out = self.train.losses(self.influence.left_out().cpu())
        scores = {
            "left out": left_out,
            "self-influence": left_out - own,
            "exact": exact,
            "classical": classical,
            "training loss": own,
            "anchor": self.train.losses(self.train.anchored),
            "random": self.order.argsort().double(),
        }
        some = self.order[:checked]
        true = self._true_harms(weights, some, l2)
        return {
            "part": part,
            "l2": l2,
            "influence_seconds": seconds,
            "training_loss": float(own.mean()),
            "training_accuracy": hits(fitted, self.train.targets),
            "left_out_loss": float(left_out.mean()),
            "whole": self._point(weights),
            "curves": [
                {
                    "count": count,
                    **{way: self._without(scores[way], count, l2) for way in WAYS},
                    "sum_of_single": {
                        name: float(scores[name][_worst(exact, count)].sum())
                        for name in ("exact", "classical")
                    },
                }
                for count in removed
            ],
            "auc": {
                name: roc_auc_score(self.wrong.numpy(), score.numpy())
                for name, score in scores.items()
            },
            "exact_error": float((exact[some] - true).abs().max() / true.abs().max()),
            "correlation": {
                "exact": _correlation(exact[some], true),
                "classical": _correlation(classical[some], true),
            },
            "agreement": _correlation(exact, classical),
        }

    def _harms(self, weights: Tensor, changes: Tensor) -> Tensor:
        """By how much the mean validation loss falls with each change (N, M, C) of the logits."""
        judged = self.validation
        logits = judged.logits(weights)
        before = judged.losses(logits).mean()
        return torch.stack([before - judged.losses(logits + one).mean() for one in changes])

    def _true_harms(self, weights: Tensor, some: Tensor, l2: float) -> Tensor:
        """The same of some images, each left out by a fit to the others."""
        judged, everyone = self.validation, torch.arange(len(self.order))
        without = [self.refits.fit(everyone[everyone != index], l2) for index in some]
        losses = torch.stack([judged.losses(judged.logits(one)).mean() for one in without])
        return judged.losses(judged.logits(weights)).mean() - losses

    def _without(self, scores: Tensor, count: int, l2: float) -> dict[str, Any]:
        """The fit without the images of the highest scores."""
        gone = _worst(scores, count)
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[gone] = False
        point = self._point(self.refits.fit(kept.nonzero().flatten(), l2))
        return {**point, "wrong_found": int(self.wrong[gone].sum())}

    def _point(self, weights: Tensor) -> dict[str, Any]:
        judged, tested = self.validation.logits(weights), self.tested.logits(weights)
        return {
            "validation_loss": float(self.validation.losses(judged).mean()),
            "validation_accuracy": hits(judged, self.validation.targets),
            "test_loss": float(self.tested.losses(tested).mean()),
            "test": outcome(tested, self.tested.targets),
        }


def judges(kernel: TangentKernel, problem: Problem, data: CachedFeatures) -> Judges:
    """The anchor's logits of some images, and their kernel to the training images."""
    entering = problem.present(data.features)
    return Judges(entering.logits.double().cpu(), kernel.cross(entering).cpu(), data.targets)


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


def _worst(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True)[:count]


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])
