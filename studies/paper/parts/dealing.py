"""How private images come to shards, and how shards are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.paper.methods import LOSSES, Start, ordinary
from studies.paper.parts.context import Context
from tangent_ops import CachedFeatures, LinearizedModel, fit
from tangent_ops.delta import Delta
from tangent_ops.model.features import Tail

LOSS = "square"
SMALLEST_BATCH, LARGEST_BATCH = 8, 32


@dataclass(frozen=True)
class Dealt:
    """One anchor, its shards and what they are judged on.

    Attributes:
        anchor: Its classifier is a probe of public images, which are in no shard.
        shards: Tokens and classes.
        private: Those of all shards together.
        validation: For rates and weights.
        tested: For scores.
    """

    anchor: Tail
    shards: list[CachedFeatures]
    private: CachedFeatures
    validation: CachedFeatures
    tested: CachedFeatures


def deal(context: Context, arguments: dict[str, Any]) -> Dealt:
    """The shards of a seed: "iid", or "by class", each a stretch of the images sorted by class."""
    prepared = context.prepared(arguments["images"])
    sizes = [arguments["public"], arguments["train"], arguments["validation"]]
    public, private, validation = prepared.drawn(arguments["seed"], sizes)
    anchor = context.anchor(arguments["images"], public, LOSS, arguments["seed"])
    if arguments.get("deal", "iid") == "by class":
        private = private[prepared.targets[private].argsort(stable=True)]
    parts = private.tensor_split(arguments["shards"])
    shards = [prepared.rows(1, part) for part in parts]
    everything = prepared.rows(1, private)
    return Dealt(anchor, shards, everything, prepared.rows(1, validation), prepared.tested(1))


def fit_shards(
    tangent: LinearizedModel, shards: list[CachedFeatures], lr: float, epochs: int, seed: int
) -> list[Delta]:
    """A delta for each shard, every one from zeros."""
    deltas = []
    for shard in shards:
        reset(tangent)
        options: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_of(shard)}
        fit(tangent, shard, loss=LOSSES[LOSS](), seed=seed, progress=False, **options)
        deltas.append(tangent.delta_dict())
    return deltas


def fit_ordinary(
    anchor: Tail, shards: list[CachedFeatures], lr: float, epochs: int, seed: int
) -> list[nn.Module]:
    """An ordinary model for each shard, every one from the anchor."""
    return [
        ordinary(Start(anchor, shard, LOSS, seed, epochs, batch_of(shard)), lr) for shard in shards
    ]


def reset(tangent: LinearizedModel) -> None:
    """Set the deltas to zero."""
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.zero_()


def batch_of(shard: CachedFeatures) -> int:
    """A quarter of a shard, within limits: small shards take several steps to a pass too."""
    return min(max(len(shard) // 4, SMALLEST_BATCH), LARGEST_BATCH)


def joined(shards: list[CachedFeatures]) -> CachedFeatures:
    """The union of shards."""
    features = torch.cat([shard.features for shard in shards])
    return CachedFeatures(features, torch.cat([shard.targets for shard in shards]))


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Of models whose outputs are averaged."""
    return torch.stack(logits).mean(dim=0)


def uniform_soup(models: list[nn.Module]) -> dict[str, Tensor]:
    """State dict of the models' mean weights, summed in float64 and rounded once.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time", ICML 2022 (arXiv:2203.05482).
    """
    states = [model.state_dict() for model in models]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        for name, value in states[0].items()
    }
