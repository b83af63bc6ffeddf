"""Mechanisms in public coordinates, each for core and head and for the head alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from studies.paper.outcomes import hits, outcome_of
from studies.paper.parts.private_ways import (
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
DESCENT_STEPS = 10
DESCENT_RATES = (0.1, 0.2, 0.4)
QUANTILES = (0.5, 0.9)  # of public gradients' norms
BOUND_QUANTILE = 0.5  # of public features' norms
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


Coordinates = tuple[Tensor, Tensor]  # z (K,) and Z (C, L)
Solve = Callable[[int], Coordinates]  # of a draw of the noise; the draw 0 is released


class PublicSubspace:
    """The mechanisms in public coordinates, for core and head and for the head alone.

    Features are read once for all mechanisms, options and ε. The head alone chooses first; the core
    is added to the head's directions that it chose, and chooses its own.
    """

    def __init__(self, given: Given) -> None:
        arguments = given.arguments
        began = time.perf_counter()
        basis, head = given.basis(), given.anchor.get_submodule("head")
        assert isinstance(head, nn.Linear)
        self.given, self.seed = given, arguments["seed"]
        self.tangent = linearize(given.anchor, core=basis)
        self.most_core, self.most_head = basis.directions, head.in_features + 1
        self.where = public_coordinates(
            self.tangent, given.public, core=self.most_core, head=self.most_head, progress=False
        )
        self.start = self.tangent.delta_dict()
        self.public, self.private, self.validation = (
            read(self.tangent, data, self.where)
            for data in (given.public, given.private, given.validation)
        )
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
        sigma = self.sigma(epsilon, DESCENT_STEPS)

        def solved(core: int, head: int, quantile: float, lr: float) -> Solve:
            private = self.private.narrowed(core, head)
            clips = clips_of(self.public.narrowed(core, head), quantile)

            def solve(draw: int) -> Coordinates:
                privacy = None if sigma is None else self.privacy(sigma, DESCENT_STEPS, draw)
                return descend(private, privacy, clips, lr=lr, steps=DESCENT_STEPS)

            return solve

        def rated(core: int, head: int, quantile: float) -> Choice[Solve]:
            def make(lr: float) -> tuple[float, Solve]:
                solve = solved(core, head, quantile, lr)
                return self.judged(core, head, solve), solve

            return choose(DESCENT_RATES, make, limits=(0, 1))

        def of_head(head: float) -> tuple[float, Choice[Choice[Solve]]]:
            quantiles = choose(QUANTILES, lambda q: _outer(rated(0, int(head), q)), limits=(0, 1))
            return _outer(quantiles)

        arguments = self.given.arguments
        heads = choose(arguments["head_directions"], of_head, limits=(8, self.most_head))
        quantiles = heads.result
        self.add(DESCENT_HEAD, epsilon, 0, int(heads.value), quantiles.result)
        told = {"directions": heads, "quantile": quantiles, "rate": quantiles.result}
        self.tell(DESCENT_HEAD, epsilon, told)

        cores = choose(
            arguments["core_directions"],
            lambda core: _outer(rated(int(core), int(heads.value), quantiles.value)),
            limits=(8, self.most_core),
        )
        self.add(DESCENT, epsilon, int(cores.value), int(heads.value), cores.result)
        self.tell(DESCENT, epsilon, {"core's directions": cores, "rate": cores.result})

    def statistics(self, epsilon: float) -> None:
        """Of the head alone, and of core and head; each kind of `SHARES` is tried."""
        sigma = self.sigma(epsilon, 1)
        assert sigma is not None

        def of_kind(kind: str, core: int, head: int) -> tuple[float, Choice[Solve]]:
            where = narrowed(self.where, core, head)
            bounds = bounds_of(self.public.narrowed(core, head), BOUND_QUANTILE)
            sums, count = self.sums(core, head, bounds), len(self.given.private)

            @functools.cache
            def released(draw: int) -> NoisyStatistics:
                privacy = self.privacy(sigma, 1, draw)
                return release(sums, count, self.start, where, privacy, bounds, SHARES[kind])

            def make(l2: float) -> tuple[float, Solve]:
                def solve(draw: int) -> Coordinates:
                    return solution(released(draw), None if kind == ADASSP else l2)

                return self.judged(core, head, solve), solve

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
        self.add(STATISTICS_HEAD, epsilon, 0, int(heads.value), heads.result)
        self.tell(STATISTICS_HEAD, epsilon, {"directions": heads, "ridge": heads.result})
        cores = choose(
            arguments["statistics_core"],
            lambda n: best(int(n), int(heads.value)),
            limits=(1, min(self.most_core, 2 * max(arguments["statistics_core"]))),
        )
        self.add(STATISTICS, epsilon, int(cores.value), int(heads.value), cores.result)
        self.tell(STATISTICS, epsilon, {"core's directions": cores, "ridge": cores.result})

    def sums(self, core: int, head: int, bounds: FeatureBounds) -> dict[str, Tensor]:
        """Of the private samples, without noise."""
        private = self.private.narrowed(core, head)
        return clipped_sums(private.rows, private.residuals, bounds)

    def sigma(self, epsilon: float | None, steps: int) -> float | None:
        """The noise multiplier; None for no noise."""
        if epsilon is None:
            return None
        failure = self.given.arguments["failure"]
        return noise_multiplier_for(epsilon, failure, sample_rate=1.0, steps=steps)

    def privacy(self, sigma: float, steps: int, draw: int) -> Privacy:
        """Of one draw of the noise."""
        failure, seed = self.given.arguments["failure"], 100 * self.seed + draw
        return Privacy(delta=failure, noise_multiplier=sigma, steps=steps, seed=seed)

    def judged(self, core: int, head: int, solve: Solve) -> float:
        """Fraction of the validation images that are right, a mean over draws of the noise."""
        validation, targets = self.validation.narrowed(core, head), self.given.validation.targets
        draws = range(1, 1 + self.given.arguments["draws"])
        return fmean(hits(validation.logits(*solve(draw)), targets) for draw in draws)

    def add(
        self, way: str, epsilon: float | None, core: int, head: int, best: Choice[Solve]
    ) -> None:
        """Release the chosen one, and score it on test images."""
        began = time.perf_counter()
        z, columns = best.result(0)
        seconds = time.perf_counter() - began + self.reading_seconds
        deltas = narrowed(self.where, core, head).deltas(z, columns)
        self.tangent.load_delta_dict(Delta(deltas, self.start.meta))
        self.ways.append(
            {
                "way": way,
                "epsilon": epsilon,
                "validation": best.tried[best.value],
                "tested": outcome_of(self.tangent, self.given.tested),
                "seconds": seconds,
            }
        )

    def tell(self, way: str, epsilon: float | None, choices: Mapping[str, Choice[Any]]) -> None:
        """Keep what was chosen."""
        words = "without noise" if epsilon is None else f"ε = {epsilon:g}"
        self.choices |= {f"{way}, {words}: {name}": c.told() for name, c in choices.items()}


def _outer(choice: Choice[Any]) -> tuple[float, Choice[Any]]:
    """A choice within another one: its best score, and itself."""
    return choice.tried[choice.value], choice
