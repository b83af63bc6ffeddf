"""Shared by the demos: options, the split of the images, the anchor, its tokens and its probe."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from assets import VIT_SMALL, DemoError, default_cache, fetch
from backbone import IMAGE_SIZE, load_backbone, load_timm
from images import Images, by_owner, load_images, stratified
from rich.console import Console
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from tangent_ops import (
    CachedFeatures,
    LinearizedModel,
    cache_features,
    fit,
    last_blocks,
    linearize,
    predict,
)
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import split_model

LOSS = RescaledSquareLoss()
PROBE: dict[str, Any] = {"epochs": 30, "lr": 1e-2}

console = Console()


@dataclass(frozen=True)
class Part:
    """Some of the images.

    Attributes:
        images: The images, for pictures.
        tokens: What enters the last block, and the classes.
        features: What enters the head, and the classes.
    """

    images: Images
    tokens: Subset[Any]
    features: Subset[Any]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Prepared:
    """What every demo starts from.

    Attributes:
        anchor: The model with a linear probe of the public images as its head.
        tail: The linearization of its last block, norm and head: tokens to logits.
        scored: The images that every model is scored on.
        public: The images of the anchor's head, which are in no shard.
        shards: The private images.
        seconds: Time of the anchor's probe.
    """

    anchor: Any
    tail: LinearizedModel
    scored: Part
    public: Part
    shards: Sequence[Part]
    seconds: float


def parser_of(description: str, private: int, shards: int = 0) -> argparse.ArgumentParser:
    """The options that all demos have.

    Args:
        description: What the demo does.
        private: How many private images by default.
        shards: How many shards by default; 0 for a demo without the options of shards.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="mnist", help="mnist, digits, or a folder with a sub-folder per class")
    add("--model", help="a timm model with published weights instead of the ViT-S/14 from pip")
    add(
        "--image-size",
        type=int,
        default=IMAGE_SIZE,
        help="pixels, a multiple of 14; of the ViT-S/14",
    )
    add("--private", type=int, default=private, help="private images; 100 more are public")
    if shards:
        add(
            "--shards",
            type=int,
            default=shards,
            help="parts that the private images are dealt into",
        )
        add("--forget", type=int, default=3, help="the shard to forget, from 1")
    add("--scored", type=int, default=1000, help="images that every model is scored on")
    add("--score-on", choices=("test", "validation"), default="test", help="images to score on")
    add("--seed", type=int, default=0, help="of the split and of the order of the samples")
    add("--out", type=Path, default=Path("out"), help="folder for the results")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    add("--quick", action="store_true", help="few images and steps: to see that it runs")
    return parser


def load(options: argparse.Namespace) -> tuple[Any, Images]:
    """Load the backbone and the images, fetching what is missing."""
    torch.manual_seed(options.seed)
    if options.model:
        model = load_timm(options.model)
    else:
        model = load_backbone(fetch(VIT_SMALL, options.cache), options.image_size)
    images = load_images(options.data, resolve_model_data_config(model), options.cache)
    console.print(f"{model_name(model)}; {images.name}, {len(images.classes)} classes")
    return model, images


def deal(images: Images, options: argparse.Namespace) -> list[Images]:
    """Draw disjoint parts: the scored images, the public ones, and the shards of private ones.

    Args:
        images: What to draw from. Which become test images depends on the seed alone.
        options: Of the demo; without options of shards there is one.

    Raises:
        DemoError: There are too few images, or no shard of the number to forget.
    """
    shards, own = getattr(options, "shards", 1), getattr(options, "own", 0.0)
    if "forget" in options and not (shards > 1 and 1 <= options.forget <= shards):
        raise DemoError(
            f"--shards {shards} --forget {options.forget}: expected at least 2 shards, and one of "
            "them to forget, from 1"
        )
    most = len(images.targets)
    scored = min(200 if options.quick else options.scored, most // 4)
    public = 60 if options.quick else 100
    private = min(options.private, 250 if options.quick else most, most - 2 * scored - public)
    if min(public, private // shards) < len(images.classes):
        raise DemoError(
            f"{images.name} gives {public} public images and {private // shards} to a shard, fewer "
            f"than its {len(images.classes)} classes: raise --private or lower --shards"
        )
    parts = stratified(images.targets, [scored, scored, public, private], options.seed)
    dealt = [parts[3][index] for index in by_owner(images.targets[parts[3]], shards, own)]
    chosen = parts[options.score_on == "validation"]
    return [images.subset(part) for part in (chosen, parts[2], *dealt)]


def prepare(model: Any, parts: Sequence[Images], seed: int) -> Prepared:
    """Compute the tokens of all parts once, train the public probe, and linearize there.

    A composition keeps f(x; w0), whatever is taken out of it. So what may have to be forgotten is
    not in the anchor: its head is a linear probe of the public images.

    Args:
        model: A timm vision transformer without a classifier.
        parts: As `deal` gives them.
        seed: Of the probe.
    """
    trunk, bare = split_model(model, len(model.blocks) - 1)
    joined = ConcatDataset([part.data for part in parts])
    tokens = cache_features(trunk, DataLoader(joined, 64))
    features = CachedFeatures(predict(bare, tokens, progress=False), tokens.targets)
    ends = [0, *accumulate(len(part.targets) for part in parts)]
    cut = [
        Part(part, tokens.subset(range(*ends)), features.subset(range(*ends)))
        for part, ends in zip(parts, pairwise(ends), strict=True)
    ]
    head, seconds = probe(cut[1].features, len(parts[0].classes), seed)
    anchor = copy.deepcopy(model)
    anchor.reset_classifier(head.out_features)
    anchor.get_classifier().load_state_dict(head.state_dict())
    anchor.eval()
    tail = linearize(anchor, last_blocks(anchor, 1)).split()[1]
    return Prepared(anchor, tail, cut[0], cut[1], cut[2:], seconds)


def probe(features: Dataset[Any], classes: int, seed: int) -> tuple[nn.Linear, float]:
    """Train a linear head, from zeros, on features computed before; give it and the seconds."""
    head = nn.Linear(len(features[0][0]), classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    history = fit(head, features, loss=LOSS, seed=seed, progress=False, **PROBE)
    return head, history.seconds


def model_name(model: Any) -> str:
    """The architecture and, if the weights are not timm's, where they come from."""
    name = model.pretrained_cfg["architecture"]
    tag = model.pretrained_cfg.get("tag")
    return f"{name}, {tag}" if tag else name


def step(title: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{title}[/bold]")
