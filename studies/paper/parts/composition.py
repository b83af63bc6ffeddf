"""Part 3: tangent models of shards composed, against one of all their images.

Everything here is linear in its deltas, so training runs in the span of the samples' Jacobian rows
(`studies.paper.span`): wide grids for every number of shards, in either deal, cost little.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studies.paper.cells import Cell
from studies.paper.methods import LOSSES
from studies.paper.outcomes import hits, outcome_of
from studies.paper.parts.context import Context
from studies.paper.parts.dealing import LOSS, Dealt, batch_of, deal, joined
from studies.paper.span import Span
from studies.paper.tuning import choose
from tangent_ops import (
    CachedFeatures,
    LinearizedModel,
    compose,
    compose_lossless,
    core_basis,
    linearize,
    statistics,
)
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta
from tangent_ops.exact import head_statistics

PART = "composition"
RATES = (5e-5, 1e-4, 2e-4)
L2S = (0.1, 1.0, 10.0)
FACTORS = (0.7, 1.0, 1.4)  # of the mean, as task arithmetic has it
ROUNDS = (3, 8)  # of products with every shard's curvature
CORE, CORE_IMAGES = 8, 50  # directions on either side of a layer, and what they come from
DIVERGED = -1.0


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        sets: Of images.
        shards: How many the private images are dealt into, at random and by class.
        fine_sets: Those with more numbers of shards.
        fine_shards: These numbers.
        rounds: The numbers of shards of the ways that take longer.
        public: Images of the anchor's classifier, in no shard.
        train: Private images.
        validation: Images that options are chosen on.
        epochs: Passes of each shard over its images.
    """

    sets: tuple[str, ...]
    shards: tuple[int, ...] = (10, 50)
    fine_sets: tuple[str, ...] = ()
    fine_shards: tuple[int, ...] = (2, 5, 10, 25, 50)
    rounds: tuple[int, ...] = (10,)
    public: int = 100
    train: int = 800
    validation: int = 200
    epochs: int = 20


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """One cell to each set and seed: all of its compositions share one kernel."""
    given = {"public": sizes.public, "train": sizes.train, "validation": sizes.validation}
    given |= {"rounds": list(sizes.rounds), "epochs": sizes.epochs}
    for images in sizes.sets:
        shards = sizes.fine_shards if images in sizes.fine_sets else sizes.shards
        for seed in seeds:
            yield Cell(PART, {"images": images, "seed": seed, "shards": list(shards), **given})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train all of it jointly, and in shards; compose these, and score every composition."""
    one = Composer(arguments, deal(context, {**arguments, "shards": 1}))
    joint = one.indices
    one.tuned("joint", "sgd", 1, RATES, lambda rates: one.descents([joint], rates))
    l2 = one.tuned("joint", "exact", 1, L2S, lambda l2s: [one.span.solve(joint, x) for x in l2s])
    one.statistics()
    by_class = one.dealt.private.targets.argsort(stable=True)
    for deal_, order in (("iid", joint), ("by class", by_class)):
        for count in arguments["shards"]:
            shards = [order[part] for part in joint.tensor_split(count)]
            one.means(deal_, shards)
            if count in arguments["rounds"]:
                one.rounds(deal_, shards, l2)
    return {
        "anchor": outcome_of(one.dealt.anchor, one.dealt.tested),
        "rows": one.rows,
        "choices": one.choices,
        "delta_bytes": one.delta_bytes,
        "statistics_bytes": one.statistics_bytes,
    }


class Composer:
    """One seed's images, and the rows of its table.

    Args:
        arguments: Of the cell.
        dealt: All private images in one shard.

    Attributes:
        indices: Of the private images among the span's samples.
        judges: Of the validation images.
        public: Of the public ones.
        rows: What came out: deal, way, number of shards, seconds, and the outcome on test images.
        choices: Of options.
    """

    def __init__(self, arguments: dict[str, Any], dealt: Dealt) -> None:
        self.arguments, self.dealt = arguments, dealt
        self.tangent: LinearizedModel = linearize(dealt.anchor)
        self.span = Span(self.tangent, joined([dealt.private, dealt.validation, dealt.public]))
        sizes = [len(part) for part in (dealt.private, dealt.validation, dealt.public)]
        self.indices, self.judges, self.public = torch.arange(sum(sizes)).split(sizes)
        self.rows: list[dict[str, Any]] = []
        self.choices: dict[str, Any] = {}
        self.delta_bytes = sum(v.numel() * v.itemsize for v in self.tangent.deltas().values())
        self.statistics_bytes = 0
        self._at_anchor: TangentStatistics | None = None

    def tuned(
        self,
        deal_: str,
        way: str,
        count: int,
        grid: Sequence[float],
        make: Callable[[Sequence[float]], Sequence[Tensor]],
    ) -> float:
        """Choose an option's value on the validation images, and score it; return the value.

        Args:
            deal_: Of the row.
            way: Of the row.
            count: Of shards.
            grid: That is begun with.
            make: Values -> c for each.
        """
        began = time.perf_counter()
        made = dict(zip(grid, make(grid), strict=True))

        def judged(value: float) -> tuple[float, Tensor]:
            weights = made[value] if value in made else make([value])[0]
            if not weights.isfinite().all():
                return DIVERGED, weights
            return hits(
                self.span.logits(weights, self.judges), self.dealt.validation.targets
            ), weights

        best = choose(grid, judged)
        seconds = (time.perf_counter() - began) / len(best.tried)
        self.choices[f"{way}, {count} {deal_}"] = best.told()
        self.score(deal_, way, count, self.span.delta(best.result), seconds)
        return best.value

    def score(self, deal_: str, way: str, count: int, delta: Delta, seconds: float) -> None:
        """A row of a delta of the last block."""
        self.tangent.load_delta_dict(delta)
        found = outcome_of(self.tangent, self.dealt.tested)
        self.rows.append(
            {"deal": deal_, "way": way, "shards": count, "seconds": seconds, "test": found}
        )

    def descents(self, shards: Sequence[Tensor], rates: Sequence[float]) -> list[Tensor]:
        """The mean over shards of what SGD comes to, for each rate."""
        loss, seed = LOSSES[LOSS](), self.arguments["seed"]
        options: dict[str, Any] = {"epochs": self.arguments["epochs"], "seed": seed}
        total = torch.zeros(())
        for part in shards:
            batch = batch_of(len(part))
            total = total + self.span.descend(part, loss, lr=rates, batch=batch, **options)
        return [*(total / len(shards))]

    def optima(
        self, shards: Sequence[Tensor], l2: float, public: Tensor | None = None
    ) -> list[Tensor]:
        """The shards' exact fits, alone or with public images."""
        return [self.span.solve(part, l2, public) for part in shards]

    def means(self, deal_: str, shards: Sequence[Tensor]) -> None:
        """Means of SGD's and of exact fits, and heads in closed form.

        Exact fits are also weighted, taken times a factor, and fitted with public curvature, which
        the heads are for.
        """
        count = len(shards)
        self.tuned(deal_, "sgd mean", count, RATES, functools.partial(self.descents, shards))
        optima = self.exact_mean(deal_, shards, "exact mean", None)
        total = mean_of(optima)

        def times(factors: Sequence[float]) -> list[Tensor]:
            return [factor * total for factor in factors]

        self.tuned(deal_, "factor", count, FACTORS, times)
        if count in self.arguments["rounds"]:
            began = time.perf_counter()
            data = {"tangent": self.tangent, "data": self.dealt.validation}
            fitted = compose([self.span.delta(one) for one in optima], "least-squares", **data)
            self.score(deal_, "weights", count, fitted, time.perf_counter() - began)
        optima = self.exact_mean(deal_, shards, "public mean", self.public)
        middle = self.span.delta(mean_of(optima))
        self.head(deal_, "head", count, middle, None)
        if count in self.arguments["rounds"]:
            self.head(deal_, "head, a round", count, middle, middle)

    def exact_mean(
        self, deal_: str, shards: Sequence[Tensor], way: str, public: Tensor | None
    ) -> list[Tensor]:
        """The mean of exact fits, with or without public images; returns the fits."""

        def means(l2s: Sequence[float]) -> list[Tensor]:
            return [mean_of(self.optima(shards, l2, public)) for l2 in l2s]

        return self.optima(shards, self.tuned(deal_, way, len(shards), L2S, means), public)

    def head(self, deal_: str, way: str, count: int, mean: Delta, at: Delta | None) -> None:
        """The mean with the head's optimum on all images, from sums at the anchor or at the mean.

        Sums are exact: those of all images are the sum of those of the shards.
        """
        began = time.perf_counter()
        delta = compose([mean], how="head", statistics=[self.head_sums(at)])
        self.score(deal_, way, count, delta, time.perf_counter() - began)

    def head_sums(self, at: Delta | None) -> TangentStatistics:
        """Of all private images; at the anchor for None."""
        if at is None and self._at_anchor is not None:
            return self._at_anchor
        self.tangent.zero_()
        found = head_statistics(self.tangent, self.dealt.private, at, progress=False)
        self._at_anchor = found if at is None else self._at_anchor
        return found

    def rounds(self, deal_: str, shards: Sequence[Tensor], l2: float) -> None:
        """Lossless compositions that stop after a few rounds; l2 is that of the joint fit."""
        problem = self.span.problem.with_l2(l2)
        everything = set(range(problem.samples))
        self.tangent.zero_()
        deltas = [self.span.delta(one) for one in self.optima(shards, l2)]
        curvatures = [
            problem.without(sorted(everything - set(part.tolist()))).curvature() for part in shards
        ]
        for most in ROUNDS:
            began = time.perf_counter()
            options: dict[str, Any] = {"max_rounds": most, "progress": False}
            delta = compose_lossless(deltas, curvatures, 1e-6, **options)
            seconds = time.perf_counter() - began
            self.score(deal_, f"lossless, {most} rounds", len(shards), delta, seconds)

    def statistics(self) -> None:
        """Sums in a core of public images: the same bits however the images are dealt."""
        public = self.dealt.public
        some = CachedFeatures(public.features[:CORE_IMAGES], public.targets[:CORE_IMAGES])
        core = core_basis(self.dealt.anchor, some, size=CORE)
        tangent = linearize(self.dealt.anchor, core=core)
        began = time.perf_counter()
        halves = self.indices.tensor_split(2)
        first, second = (statistics(tangent, self.part(h), progress=False) for h in halves)
        sums = first + second
        tangent.load_delta_dict(sums.choose().delta)
        seconds = time.perf_counter() - began
        self.statistics_bytes = sums.nbytes
        found = outcome_of(tangent, self.dealt.tested)
        row = {"deal": "joint", "way": "statistics", "shards": 1, "seconds": seconds}
        self.rows.append({**row, "test": found})

    def part(self, indices: Tensor) -> CachedFeatures:
        private = self.dealt.private
        return CachedFeatures(private.features[indices], private.targets[indices])


def mean_of(several: Sequence[Tensor]) -> Tensor:
    return torch.stack([*several]).mean(dim=0)
