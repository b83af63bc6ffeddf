"""Fine-tune a real pre-trained ViT on shards of real images, compose them, forget one.

    python examples/shards_demo.py --help

What may have to be forgotten must not be in the anchor: a composition keeps f(x; w0) whatever is
taken out of it. So the anchor's head is a linear probe of *public* images, which are in no shard.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from assets import VIT_SMALL, DemoError, default_cache, fetch
from backbone import load_backbone, load_timm
from images import Images, load_images
from report import Results, Row, Sample, print_table, write_report
from rich.console import Console
from setting import Settings, split_images
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from tangent_ops import (
    cache_features,
    compose,
    last_blocks,
    linearize,
    load_delta,
    save_delta,
)
from tangent_ops.errors import TangentOpsError
from tangent_ops.evaluate import accuracy, predict
from tangent_ops.features import split_model
from tangent_ops.fit import fit, fit_head

# One rate for ordinary and for tangent fine-tuning. It was chosen once, on the validation images
# of MNIST-5k (--score-on validation, seed 0), from 1e-4, 3e-4 and 1e-3: 3e-4 was best for each of
# ordinary fine-tuning, TAFT on all the data and the composition. The test images had no say.
LEARNING_RATE = 3e-4
PROBE_EPOCHS = 30
"""Cheap: the probe's features are computed once."""

console = Console()


def run(model: nn.Module, images: Images, settings: Settings) -> Results:
    """Run every step; the deltas are written to ``settings.out / "deltas"``."""
    start = time.perf_counter()
    split = split_images(images, settings)
    names = range(1, settings.shards + 1)
    public, private = len(split.public.targets), len(split.shards[0].targets)
    everything = public + settings.shards * private
    scored_on = len(split.scored.targets)
    results = Results(images.name, settings, public, private, scored_on)
    training = {"epochs": settings.epochs, "lr": LEARNING_RATE, "seed": settings.seed}

    with step("Linear probes: of the public images (the anchor), and of all, to compare with") as t:
        probing = {"num_classes": len(images.classes), "epochs": PROBE_EPOCHS}
        anchored, _ = fit_head(model, split.public.data, **probing)
        probed, history = fit_head(
            model, ConcatDataset([split.public.data, *(s.data for s in split.shards)]), **probing
        )

    with step("Linearize; compute what enters the last block, once for all that follows"):
        tangent = linearize(anchored, last_blocks(anchored, 1))
        trunk, tail = tangent.split()
        parts = [split.public, *split.shards, split.scored]
        loader = DataLoader(ConcatDataset([part.data for part in parts]), batch_size=64)
        tokens = cache_features(trunk, loader)
        public_tokens = ...
