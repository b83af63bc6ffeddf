"""Mechanisms in public coordinates, each for core and head and for the head alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from studies.paper.outcomes import hits, outcome_of
from studies.paper.parts.private_ways import (
    Read,
    bounds_of,
    clips_of,
    descend,
    narrowed,
    read,
    release,
    solution,
)
from studies.paper.tuning import Choice, choose
from tangent_ops import CachedFeatures, linearize
from tangent_ops.delta import Delta
from tangent_ops.model.core_basis import CoreBasis, core_basis
from tangent_ops.model.features import Tail
from tangent_ops.privacy import (
    FeatureBounds,
    NoisyStatistics,
    Privacy,
    Shares,
    public_coordinates,
)
from tangent_ops.privacy.accounting import noise_multiplier_for
from tangent_ops.privacy.regression.noisy_statistics import clipped_sums

DESCENT, DESCENT_HEAD = "descent", "descent, head"
STATISTICS, STATISTICS_HEAD = "statistics", "statistics, head"
PUBLIC = "public subspace"  # the cell of these four
BOUND_QUANTILE = 0.5  # of public features' norms
FRESH = range(50, 58)  # draws of the noise, that the best way is chosen by
RIDGES = (0.1, 1.0, 10.0)
ADASSP = "AdaSSP"
SHARES = {
    ADASSP: Shares(),
    "H of public images": Shares(0.0, 0.0),
    "noisy H": Shares(1 / 3, 0.0),
}


@dataclass(frozen=True)
class Given:
    """What the ways of a cell train on and are judged on."""

    arguments: dict[str, Any]
    anchor: Tail
    public: CachedFeatures
    private: CachedFeatures
    validation: CachedFeatures
    tested: CachedFeatures

    def basis(self) -> CoreBasis:
        """The core's sides, from public images; by gradients, which take less time than K-FAC."""
        return core_basis(self.anchor, self.public, self.arguments["core"], method="gradient")

    def found(self, choices: dict[str, Any], ways: list[dict[str, Any]]) -> dict[str, Any]:
        """A cell's result."""
        return {"choices": choices, "ways": ways, "samples": len(self.private)}


@dataclass(frozen=True)
class Options:
    """Of noisy descent.

    Attributes:
        core: Directions of the core; 0 for the head alone.
        head: The same of the head's inputs.
        length: The sum of all steps' rates, as far as none is above 1.
        quantile: Of public gradients' norms, to clip to.
        steps: Their number.
        share: The core's, of the budget.
    """

    core: int
    head: int
    length: float = 2.0
    quantile: float = 0.5
    steps: int = 20
    share: float = 0.1

    @property
    def rate(self) -> float:
        """Of a step; up to 1, as the library has it."""
        return min(1.0, self.length / self.steps)


TRIED: dict[str, tuple[float, ...]] = {  # at first
    "length": (1.0, 2.0, 4.0),
    "quantile": (0.25, 0.5, 0.75),
    "steps": (5, 10, 20),
    "share": (0.03, 0.1, 0.3),
}
MOST_STEPS = 40
Chosen = tuple[float, tuple[Options, dict[str, Choice[Options]]]]  # score, options, how
Coordinates = tuple[Tensor, Tensor]  # z (K,) and Z (C, L)
Solve = Callable[[int], Coordinates]  # of a draw of the noise; the draw 0 is released


class PublicSubspace:
    """The mechanisms in public coordinates, for core and head and for the head alone.

    Features are read once for all mechanisms, options and ε. Coordinates and bounds are from public
    images, those of validation among them. The head alone chooses first; core and head start from
    what it chose.
    """

    def __init__(self, given: Given) -> None:
        arguments = given.arguments
        began = time.perf_counter()
        basis, head = given.basis(), given.anchor.get_submodule("head")
        assert isinstance(head, nn.Linear)
        self.given, self.seed = given, arguments["seed"]
        self.tangent = linearize(given.anchor, core=basis)
        self.most_core, self.most_head = basis.directions, head.in_features + 1
        both = given.public, given.validation
        public = CachedFeatures(
            torch.cat([data.features for data in both]), torch.cat([data.targets for data in both])
        )
        self.where = public_coordinates(
            self.tangent, public, core=self.most_core, head=self.most_head, progress=False
        )
        self.start = self.tangent.delta_dict()
        self.private, self.validation = (
            read(self.tangent, data, self.where) for data in (given.private, given.validation)
        )
        self.single = self.private.single()
        self.reading_seconds = time.perf_counter() - began
        self.choices: dict[str, Any] = {}
        self.ways: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All ε, and the descents without noise."""
        anchor = outcome_of(self.given.anchor, self.given.tested)
        for epsilon in (*self.given.arguments["epsilons"], None):
            self.descents(epsilon)
            if epsilon is not None:
                self.statistics(epsilon)
        found = self.given.found(self.choices, self.ways)
        return found | {"anchor": anchor, "reading_seconds": self.reading_seconds}

    def descents(self, epsilon: float | None) -> None:
        """Of the head alone, and of core and head."""

        @functools.cache
        def judged(options: Options) -> float:
            private = self.single.narrowed(options.core, options.head)
            solve = self.descent(private, epsilon, options)
            draws = 1 if epsilon is None else self.given.arguments["draws"]
            return self.judged(options.core, options.head, solve, range(1, 1 + draws))

        def searched(options: Options, names: tuple[str, ...]) -> Chosen:
            """One option after the other is chosen, with the others as they are."""
            made: dict[str, Choice[Options]] = {}
            for name in names:

                def make(value: float, name: str = name, now: Options = options):
                    tried = replace(now, **{name: value})
                    return judged(tried), tried

                limits = self.limits(name, options)
                made[name] = choose(self.grid(name), make, limits=limits)
                options = made[name].result
            return judged(options), (options, made)

        def added(way: str, outer: str, options: Options, names: tuple[str, ...]) -> Options:
            """For each number of directions the other options are chosen."""

            def make(value: float) -> Chosen:
                return searched(replace(options, **{outer: value}), names)

            limits = self.limits(outer, options)
            directions = choose(self.grid(outer), make, limits=limits)
            best, made = directions.result
            solve = self.descent(self.private.narrowed(best.core, best.head), epsilon, best)
            self.add(way, epsilon, best.core, best.head, solve)
            self.tell(way, epsilon, {outer: directions, **made})
            return best

        start = Options(0, self.given.arguments["head_directions"][0])
        head = added(DESCENT_HEAD, "head", start, ("length", "quantile", "steps"))
        names = ("share", "head", "length", "quantile", "steps")
        added(DESCENT, "core", head, names)

    def grid(self, name: str) -> tuple[float, ...]:
        """What an option of the descent is tried with, at first."""
        return TRIED.get(name) or tuple(self.given.arguments[f"{name}_directions"])

    def limits(self, name: str, options: Options) -> tuple[float, float]:
        """Of an option's grid."""
        return {
            "core": (2, self.most_core),
            "head": (8, self.most_head),
            "length": (0.1, options.steps),
            "quantile": (0.05, 1),
            "steps": (1, MOST_STEPS),
            "share": (0.001, 0.9),
        }[name]

    def descent(self, private: Read, epsilon: float | None, options: Options) -> Solve:
        """Of samples in the options' directions."""
        public = self.validation.narrowed(options.core, options.head)
        clips = clips_of(public, options.quantile, options.share)
        steps, sigma = options.steps, self.sigma(epsilon, options.steps)

        def solve(draw: int) -> Coordinates:
            privacy = None if sigma is None else self.privacy(sigma, steps, draw)
            return descend(private, privacy, clips, lr=options.rate, steps=steps)

        return solve

    def statistics(self, epsilon: float) -> None:
        """Of the head alone, and of core and head; each kind of `SHARES` is tried."""
        sigma = self.sigma(epsilon, 1)
        assert sigma is not None

        def of_kind(kind: str, core: int, head: int) -> tuple[float, Choice[Solve]]:
            where = narrowed(self.where, core, head)
            bounds = bounds_of(self.validation.narrowed(core, head), BOUND_QUANTILE)
            sums, count = self.sums(core, head, bounds), len(self.given.private)

            @functools.cache
            def released(draw: int) -> NoisyStatistics:
                privacy = self.privacy(sigma, 1, draw)
                return release(sums, count, self.start, where, privacy, bounds, SHARES[kind])

            def make(l2: float) -> tuple[float, Solve]:
                def solve(draw: int) -> Coordinates:
                    return solution(released(draw), None if kind == ADASSP else l2)

                return self.judged(core, head, solve, range(1, 3)), solve

            if kind == ADASSP:  # its ridge is its own
                score_, solve = make(0.0)
                return score_, Choice(0.0, solve, {0.0: score_})
            return _outer(choose(RIDGES, make))

        def best(core: int, head: int) -> tuple[float, Choice[Solve]]:
            return max((of_kind(kind, core, head) for kind in SHARES), key=lambda one: one[0])

        arguments = self.given.arguments
        # A solution's time grows with the cube of C times the head's directions.
        most = min(self.most_head, 2 * max(arguments["statistics_head"]))
        heads = choose(arguments["statistics_head"], lambda n: best(0, int(n)), limits=(4, most))
        self.add(STATISTICS_HEAD, epsilon, 0, int(heads.value), heads.result.result)
        self.tell(STATISTICS_HEAD, epsilon, {"directions": heads, "ridge": heads.result})
        cores = choose(
            arguments["statistics_core"],
            lambda n: best(int(n), int(heads.value)),
            limits=(1, min(self.most_core, 2 * max(arguments["statistics_core"]))),
        )
        self.add(STATISTICS, epsilon, int(cores.value), int(heads.value), cores.result.result)
        self.tell(STATISTICS, epsilon, {"core's directions": cores, "ridge": cores.result})

    def sums(self, core: int, head: int, bounds: FeatureBounds) -> dict[str, Tensor]:
        """Of the private samples, without noise."""
        private = self.private.narrowed(core, head)
        return clipped_sums(private.rows, private.residuals, bounds)

    def sigma(self, epsilon: float | None, steps: int) -> float | None:
        """The noise multiplier; None for no noise."""
        if epsilon is None:
            return None
        return _sigma(epsilon, self.given.arguments["failure"], steps)

    def privacy(self, sigma: float, steps: int, draw: int) -> Privacy:
        """Of one draw of the noise."""
        failure, seed = self.given.arguments["failure"], 100 * self.seed + draw
        return Privacy(delta=failure, noise_multiplier=sigma, steps=steps, seed=seed)

    def judged(self, core: int, head: int, solve: Solve, draws: Sequence[int]) -> float:
        """Fraction of the validation images that are right, a mean over draws of the noise."""
        validation, targets = self.validation.narrowed(core, head), self.given.validation.targets
        found = ((z.double(), columns.double()) for z, columns in map(solve, draws))
        return fmean(hits(validation.logits(*one), targets) for one in found)

    def add(self, way: str, epsilon: float | None, core: int, head: int, solve: Solve) -> None:
        """Release the chosen one, and score it on test images.

        The best way is chosen by draws that its options were not: fewer draws or more options would
        flatter a way.
        """
        fresh = FRESH if epsilon else FRESH[:1]
        began = time.perf_counter()
        z, columns = solve(0)
        seconds = time.perf_counter() - began + self.reading_seconds
        deltas = narrowed(self.where, core, head).deltas(z, columns)
        self.tangent.load_delta_dict(Delta(deltas, self.start.meta))
        self.ways.append(
            {
                "way": way,
                "epsilon": epsilon,
                "validation": self.judged(core, head, solve, fresh),
                "tested": outcome_of(self.tangent, self.given.tested),
                "seconds": seconds,
            }
        )

    def tell(self, way: str, epsilon: float | None, choices: Mapping[str, Choice[Any]]) -> None:
        """Keep what was chosen."""
        words = "without noise" if epsilon is None else f"ε = {epsilon:g}"
        self.choices |= {f"{way}, {words}: {name}": c.told() for name, c in choices.items()}


@functools.cache
def _sigma(epsilon: float, failure: float, steps: int) -> float:
    return noise_multiplier_for(epsilon, failure, sample_rate=1.0, steps=steps)


def _outer(choice: Choice[Any]) -> tuple[float, Choice[Any]]:
    """A choice within another one: its best score, and itself."""
    return choice.tried[choice.value], choice
