"""How private images come to shards, and how shards are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.paper.methods import Start, ordinary
from studies.paper.parts.context import Context
from tangent_ops import CachedFeatures
from tangent_ops.model.features import Tail

LOSS = "square"
SMALLEST_BATCH, LARGEST_BATCH = 8, 64


@dataclass(frozen=True)
class Dealt:
    """One anchor, its shards and what they are judged on.

    Attributes:
        anchor: Its classifier is a probe of public images, which are in no shard.
        public: Tokens and classes of these.
        shards: Tokens and classes.
        private: Those of all shards together.
        validation: For rates and weights.
        tested: For scores.
    """

    anchor: Tail
    public: CachedFeatures
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
    judged, tested = prepared.rows(1, validation), prepared.tested(1)
    return Dealt(anchor, prepared.rows(1, public), shards, everything, judged, tested)


def fit_ordinary(
    anchor: Tail, shards: list[CachedFeatures], lr: float, epochs: int, seed: int
) -> list[nn.Module]:
    """An ordinary model for each shard, every one from the anchor."""
    found = []
    for shard in shards:
        found.append(ordinary(Start(anchor, shard, LOSS, seed, epochs, batch_of(len(shard))), lr))
    return found


def batch_of(samples: int) -> int:
    """Half of a shard, within limits: small shards take several steps to a pass too."""
    return min(max(samples // 2, SMALLEST_BATCH), LARGEST_BATCH)


def joined(shards: list[CachedFeatures]) -> CachedFeatures:
    """The union of shards."""
    features = torch.cat([shard.features for shard in shards])
    return CachedFeatures(features, torch.cat([shard.targets for shard in shards]))


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Of models whose outputs are averaged."""
    return torch.stack(logits).mean(dim=0)
