"""The demo's experiment: probe, fine-tune, compose, forget; one function per step.

What may be forgotten must not be in the anchor: a composition keeps f(x; w0) whatever is taken
out of it. So the anchor's head is a probe of a few *public* images, which are in no shard.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from assets import DemoError
from images import Images, stratified
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tangent_ops import (
    CachedFeatures,
    Delta,
    LinearizedModel,
    cache_features,
    compose,
    last_blocks,
    linearize,
    load_delta,
    save_delta,
)
from tangent_ops.evaluate import predict
from tangent_ops.features import split_model
from tangent_ops.fit import fit, fit_head

# Chosen once on the validation images (--score-on validation), MNIST-5k, seed 0, among 1e-4,
# 3e-4 and 1e-3; the test images had no say.
LEARNING_RATE = 3e-4
PROBE_LEARNING_RATE = 1e-2
PROBE_EPOCHS = 30
PUBLIC_SHARE = 1 / 6  # of the training images: for the anchor's head, in no shard

console = Console()


@dataclass(frozen=True)
class Settings:
    """What the command line chooses.

    Attributes:
        shards: How many parts the private images are dealt into, at least 2.
        forget: The shard to forget, from 1.
        epochs: Passes over the data, the same for every fit of the last block.
        train_size: Training images, public and private.
        test_size: Images every model is scored on, and as many for validation.
        seed: Of the split and of the order of the samples.
        score_on: "test" or "validation".
        out: Folder for the deltas and the report.
    """

    shards: int
    forget: int
    epochs: int
    train_size: int
    test_size: int
    seed: int
    score_on: str
    out: Path


@dataclass(frozen=True)
class Row:
    """One model in the table: its accuracy (0 to 1) on the scored images, and what it took."""

    name: str
    kind: str  # "probe", "ordinary", "tangent", "composed", "shard" or "forgotten"
    images: int
    accuracy: float
    seconds: float
    meaning: str


@dataclass
class Results:
    """Everything the report shows.

    Attributes:
        rows: The table.
        facts: Equalities that hold by linearity, as measured here.
        kept: Accuracy on each shard's own training images, by the composition of all shards.
        left: The same, by the composition without that shard.
        unseen: Accuracy of the composition of all shards on the scored images.
        seconds: Time of everything.
    """

    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    unseen: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Split:
    """Disjoint sets of images, each with the class proportions of the whole."""

    public: Images
    shards: Sequence[Images]
    scored: Images


def split_images(images: Images, settings: Settings) -> Split:
    """Deal the images out.

    Test and validation images stay what they are whichever of the two is scored on.

    Raises:
        DemoError: There are too few images.
    """
    public = round(settings.train_size * PUBLIC_SHARE)
    shard = (settings.train_size - public) // settings.shards
    if public < len(images.classes) or shard < len(images.classes):
        raise DemoError(
            f"{settings.train_size} training images give {public} public ones and {shard} to a "
            f"shard, fewer than the {len(images.classes)} classes: raise --train-size or lower "
            "--shards"
        )
    sizes = [settings.test_size] * 2 + [public] + [shard] * settings.shards
    parts = [images.subset(part) for part in stratified(images.targets, sizes, settings.seed)]
    scored = parts[0] if settings.score_on == "test" else parts[1]
    return Split(parts[2], parts[3:], scored)
