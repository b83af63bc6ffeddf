"""Part 5: accuracy against ε, for private tangent and ordinary fine-tuning and private probes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from studies.paper.cells import Cell
from studies.paper.outcomes import outcome_of
from studies.paper.parts.context import Context, score
from studies.paper.parts.private_subspace import PUBLIC, Given, PublicSubspace
from studies.paper.parts.private_ways import (
    PHYSICAL_BATCH,
    fit_by_opacus,
    ordinary_core,
    without_repetitions,
)
from studies.paper.tokens import FEATURES
from studies.paper.tuning import choose
from tangent_ops import linearize
from tangent_ops.model.core_basis import CoreBasis
from tangent_ops.privacy import (
    Privacy,
    fit_private,
)

PART = "privacy"
LOSS = "square"
PROBE = "probe"
TANGENT, TANGENT_CORE = "tangent", "tangent, core"
ORDINARY, ORDINARY_CORE = "ordinary", "ordinary, core"
RATES = {  # of AdamW, at first
    PROBE: (1e-3, 3e-3, 1e-2),
    TANGENT: (3e-4, 1e-3, 3e-3),
    TANGENT_CORE: (3e-4, 1e-3, 3e-3),
    ORDINARY: (3e-4, 1e-3, 3e-3),
    ORDINARY_CORE: (3e-4, 1e-3, 3e-3),
}
CLIP = 1.0  # of DP-SGD
PROBE_STEPS = 60  # of DP-SGD; they are cheap


@dataclass(frozen=True)
class ImageSizes:
    """Of one set.

    Attributes:
        public: Images of the anchor's classifier, the core's sides and the coordinates.
        private: Images that are trained on privately, before repetitions are left out.
        validation: Public images that options are chosen on.
        expected: Samples in a step of DP-SGD, on average; half of all for the probe's.
        steps: Of DP-SGD.
        draws: Of the noise, that a choice of noisy descent is made by; another is released.
    """

    public: int
    private: int
    validation: int
    expected: int
    steps: int
    draws: int


@dataclass(frozen=True)
class Sizes:
    """Of the part.

    Attributes:
        sets: Name -> sizes.
        epsilons: At `failure`, of the mechanisms in public coordinates and of the probe.
        sgd_epsilons: Those of them that the other ways by DP-SGD, which take longer, are run with.
        failure: The δ.
        core: Rows and columns of each core.
        core_directions: Numbers of the core's directions that descent is tried with.
        head_directions: The same of the head's inputs.
        statistics_core: As `core_directions`, of noisy statistics.
        statistics_head: As `head_directions`, of noisy statistics.
    """

    sets: dict[str, ImageSizes]
    epsilons: tuple[float, ...] = (0.5, 1.0, 3.0, 8.0)
    sgd_epsilons: tuple[float, ...] = (8.0,)
    failure: float = 1e-5
    core: int = 8
    core_directions: tuple[int, ...] = (4, 16, 64)
    head_directions: tuple[int, ...] = (24, 48, 96, 192)
    statistics_core: tuple[int, ...] = (8, 32)
    statistics_head: tuple[int, ...] = (24, 48)


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """For every set, seed and group of ways one cell, which has all ε."""
    for images, of_images in sizes.sets.items():
        for seed in seeds:
            given = {"images": images, "seed": seed, **asdict(of_images)}
            given |= {"failure": sizes.failure, "core": sizes.core}
            directions = {
                "core_directions": list(sizes.core_directions),
                "head_directions": list(sizes.head_directions),
                "statistics_core": list(sizes.statistics_core),
                "statistics_head": list(sizes.statistics_head),
            }
            every = list(sizes.epsilons)
            yield Cell(PART, {**given, "group": PUBLIC, "epsilons": every, **directions})
            for way in RATES:
                epsilons = every if way == PROBE else list(sizes.sgd_epsilons)
                yield Cell(PART, {**given, "group": way, "epsilons": epsilons})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train with each ε, and score on test images.

    Returns:
        Under "ways", of each way and ε (None: without noise) the test images' outcome, the accuracy
        on validation images and the seconds of the chosen training.
    """
    prepared = context.prepared(arguments["images"])
    sizes = [arguments["public"], arguments["private"], arguments["validation"]]
    drawn = prepared.drawn(arguments["seed"], sizes)
    anchor = context.anchor(arguments["images"], drawn[0], LOSS, arguments["seed"])
    public, private, validation = drawn
    # A person has one image, and the mechanisms refuse repetitions.
    private = private[without_repetitions(prepared.rows(1, private).features)]
    depth = FEATURES if arguments["group"] == PROBE else 1
    given = Given(
        arguments,
        anchor,
        prepared.rows(depth, public),
        prepared.rows(depth, private),
        prepared.rows(depth, validation),
        prepared.tested(depth),
    )
    return PublicSubspace(given).run() if arguments["group"] == PUBLIC else run_sgd(given)


def run_sgd(given: Given) -> dict[str, Any]:
    """One way by DP-SGD: the library's for tangent models, Opacus' for ordinary ones.

    The noise of the released training is not that of those that the rate is chosen by.
    """
    arguments, way = given.arguments, given.arguments["group"]
    basis = given.basis() if way in (TANGENT_CORE, ORDINARY_CORE) else None
    choices, ways = {}, []
    for epsilon in arguments["epsilons"]:
        privacy = Privacy(
            delta=arguments["failure"],
            max_grad_norm=CLIP,
            target_epsilon=epsilon,
            expected_batch_size=len(given.private) / 2 if way == PROBE else arguments["expected"],
            steps=PROBE_STEPS if way == PROBE else arguments["steps"],
            seed=100 * arguments["seed"],  # a study: to be repeated; no secret is kept
        )
        choosing = replace(privacy, seed=100 * arguments["seed"] + 1)

        def make(lr: float, choosing: Privacy = choosing) -> tuple[float, None]:
            return score(fit_way(given, way, basis, choosing, lr), given.validation), None

        choice = choose(RATES[way], make)
        choices[f"{way}, ε = {epsilon:g}: rate"] = choice.told()
        began = time.perf_counter()
        model = fit_way(given, way, basis, privacy, choice.value)
        seconds = time.perf_counter() - began
        ways.append(
            {
                "way": way,
                "epsilon": epsilon,
                "validation": choice.tried[choice.value],
                "tested": outcome_of(model, given.tested),
                "seconds": seconds,
            }
        )
    return given.found(choices, ways)


def fit_way(
    given: Given, way: str, basis: CoreBasis | None, privacy: Privacy, lr: float
) -> nn.Module:
    """Train by DP-SGD; a basis if a core is trained."""
    if way in (ORDINARY, ORDINARY_CORE):
        if basis is None:
            model = copy.deepcopy(given.anchor).requires_grad_(True)
        else:
            model = ordinary_core(given.anchor, basis)
        fit_by_opacus(model, given.private, privacy, lr)
        return model
    if way == PROBE:
        tangent = linearize(given.anchor.get_submodule("head"))
    else:
        tangent = linearize(given.anchor, core=basis)
    options: dict[str, Any] = {"lr": lr, "progress": False}
    options["physical_batch_size"] = 1000 if way == PROBE else PHYSICAL_BATCH
    fit_private(tangent, given.private, privacy, **options)
    return tangent
