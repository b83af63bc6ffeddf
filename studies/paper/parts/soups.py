"""Part 3: ordinary models of shards composed: soups, task arithmetic, TIES, ensembles."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.paper.cells import Cell
from studies.paper.outcomes import hits, logits_of, outcome
from studies.paper.parts.context import Context
from studies.paper.parts.dealing import Dealt, deal, fit_ordinary, mean_logits
from studies.paper.tuning import choose
from tangent_ops.model.features import Tail

PART = "soups"
# Shards that lack classes do less harm the less they move: those grids begin lower, and wider.
RATES = {"iid": (3e-5, 1e-4, 3e-4), "by class": (1e-6, 1e-5, 1e-4)}
FACTORS = (0.5, 1.0, 2.0)  # of the mean: task arithmetic's coefficient times the number of shards
DENSITY = 0.2  # of TIES, its paper's


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        sets: Of images, dealt at random.
        by_class: Those of them that are dealt by class, too.
        shards: How many the private images are dealt into.
        public: Images of the anchor's classifier, in no shard.
        train: Private images.
        validation: Images that options are chosen on.
        epochs: Passes of each shard over its images.
    """

    sets: tuple[str, ...]
    by_class: tuple[str, ...]
    shards: tuple[int, ...] = (10,)
    public: int = 100
    train: int = 800
    validation: int = 200
    epochs: int = 20


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """A cell to each set, seed, deal and number of shards; the joint model is of one shard."""
    given = {"public": sizes.public, "train": sizes.train, "validation": sizes.validation}
    given |= {"epochs": sizes.epochs}
    for images in sizes.sets:
        for seed in seeds:
            for count in sizes.shards:
                for deal_ in ("iid", "by class") if images in sizes.by_class else ("iid",):
                    asked = {"images": images, "seed": seed, "deal": deal_, "shards": count}
                    yield Cell(PART, {**asked, **given})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train the shards at each rate that is tried; every way chooses its own among them."""
    dealt = deal(context, arguments)
    epochs, seed = arguments["epochs"], arguments["seed"]

    @functools.cache
    def models(rate: float) -> list[nn.Module]:
        return fit_ordinary(dealt.anchor, dealt.shards, rate, epochs, seed)

    choices: dict[str, Any] = {}
    rows = []
    for way, judge in _ways(dealt).items():
        best = choose(RATES[arguments["deal"]], lambda rate, judge=judge: judge(models(rate)))
        choices[way] = best.told()
        composed, inner = best.result
        if inner is not None:
            choices[f"{way}, factor"] = inner
        began = time.perf_counter()
        logits = composed()
        row = {"way": way, "test": outcome(logits, dealt.tested.targets)}
        rows.append({**row, "seconds": time.perf_counter() - began})
    return {"rows": rows, "choices": choices}


Composed = tuple[Callable[[], Tensor], dict[str, Any] | None]  # test logits; a factor's choice


def _ways(dealt: Dealt) -> dict[str, Callable[[list[nn.Module]], tuple[float, Composed]]]:
    """Way -> judges models of shards: its accuracy on validation images, and what it composed."""
    anchor, validation = dealt.anchor, dealt.validation

    def ensemble(models: list[nn.Module]) -> tuple[float, Composed]:
        both = (validation, dealt.tested)
        logits = [mean_logits([logits_of(m, data) for m in models]) for data in both]
        return hits(logits[0], validation.targets), (lambda: logits[1], None)

    def merged(delta: dict[str, Tensor]) -> tuple[float, Composed]:
        model = with_delta(anchor, delta)
        score = hits(logits_of(model, validation), validation.targets)
        return score, (lambda: logits_of(model, dealt.tested), None)

    def with_factor(delta: dict[str, Tensor]) -> tuple[float, Composed]:
        best = choose(FACTORS, lambda x: merged({n: x * value for n, value in delta.items()}))
        return best.tried[best.value], (best.result[0], best.told())

    return {
        "soup": lambda models: merged(mean_delta(anchor, models)),
        "task arithmetic": lambda models: with_factor(mean_delta(anchor, models)),
        "TIES": lambda models: with_factor(ties_delta(anchor, models)),
        "ensemble": ensemble,
    }


def deltas_of(anchor: Tail, models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Name -> the models' differences to the anchor, stacked, in float64."""
    start = anchor.state_dict()
    states = [model.state_dict() for model in models]
    return {
        name: torch.stack([state[name].double() - value.double() for state in states])
        for name, value in start.items()
    }


def mean_delta(anchor: Tail, models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Of a uniform soup.

    Source: Wortsman et al., "Model soups", ICML 2022 (arXiv:2203.05482); times a factor it is task
    arithmetic (Ilharco et al., "Editing models with task arithmetic", ICLR 2023).
    """
    return {name: several.mean(dim=0) for name, several in deltas_of(anchor, models).items()}


def ties_delta(anchor: Tail, models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """TIES (Yadav et al., "TIES-Merging", NeurIPS 2023), by peft."""
    from peft.utils.merge_utils import ties  # slow to import

    weights = torch.ones(len(models), dtype=torch.float64)
    return {
        name: ties([*several], weights, DENSITY)
        for name, several in deltas_of(anchor, models).items()
    }


def with_delta(anchor: Tail, delta: dict[str, Tensor]) -> nn.Module:
    """A copy of the anchor, moved; rounded once."""
    model = copy.deepcopy(anchor)
    moved = {
        name: (value.double() + delta[name]).to(value.dtype)
        for name, value in anchor.state_dict().items()
    }
    model.load_state_dict(moved)
    return model.eval()
