"""Fine-tune a real pre-trained ViT on shards of real images, compose them, forget one.

    python examples/demo.py --help

Each shard is the data of one owner, who has images of some classes that others have few of.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from assets import DemoError
from common import (
    LOSS,
    Prepared,
    console,
    deal,
    load,
    model_name,
    parser_of,
    prepare,
    probe,
    run,
    step,
)
from images import owner_of
from picture import Results, draw, print_table
from torch import Tensor
from torch.utils.data import ConcatDataset

from tangent_ops import Ledger, accuracy, fit, fit_grouped, predict
from tangent_ops.delta import Delta
from tangent_ops.model.features import split_model

# Chosen at 98 px, from 1e-4 and 3e-4 and from 3e-4, 6e-4 and 1.2e-3, by scores on 712 images of
# MNIST-5k that are no test images of seed 0.
ORDINARY: dict[str, Any] = {"lr": 3e-4}
SHARD: dict[str, Any] = {"lr": 3e-4, "batch_size": 16}  # few images: more and smaller steps


def demo(options: argparse.Namespace) -> None:
    """Run the demo; write ``demo.png`` and a ledger to the output folder."""
    began = time.perf_counter()
    model, images = load(options)
    parts = deal(images, options)

    step("Compute what enters the last block, once for all that follows")
    prepared = prepare(model, parts, options.seed)
    classes, forgotten = len(images.classes), options.forget - 1
    results = Results(
        model=f"{model_name(model)}, last block, norm and head trained",
        setting=f"{images.name}: {len(prepared.public)} public images, {options.shards} shards of "
        f"about {len(prepared.shards[0])} private ones, {len(prepared.scored)} {options.score_on} "
        f"images; seed {options.seed}",
        classes=images.classes,
        own=[c for c in range(classes) if owner_of(c, classes, options.shards) == forgotten],
        forgotten=options.forget,
    )
    train_jointly(prepared, options, results)
    deltas = train_shards(prepared, options, results)
    compose_and_forget(prepared, deltas, options, results)

    results.seconds = time.perf_counter() - began
    print_table(results.model, results.setting, results.rows, results.facts, console)
    path = options.out / "demo.png"
    draw(results).savefig(path, dpi=150)
    console.print(f"\n  wrote {path} and {options.out / 'ledger'}; {results.seconds:.0f} s in all")


def train_jointly(prepared: Prepared, options: argparse.Namespace, results: Results) -> None:
    """Train on all images pooled: more accurate, but nothing can be forgotten without a refit."""
    step("All images pooled: a linear head, and ordinary fine-tuning of the last block")
    tail, scored = prepared.tail, prepared.scored
    recipe: dict[str, Any] = {"epochs": options.epochs, "loss": LOSS, "seed": options.seed}
    everything = ConcatDataset([part.tokens for part in (prepared.public, *prepared.shards)])
    features = ConcatDataset([part.features for part in (prepared.public, *prepared.shards)])
    count = len(everything)

    score = accuracy(tail, scored.tokens, progress=False)
    results.add("anchor", "head only, public images", len(prepared.public), score, prepared.seconds)
    head, seconds = probe(features, len(results.classes), options.seed)
    score = accuracy(head, scored.features, progress=False)
    results.add("head", "head only, all images pooled", count, score, seconds)
    blocks = len(prepared.anchor.blocks)
    ordinary = split_model(copy.deepcopy(prepared.anchor), blocks - 1)[1].requires_grad_(True)
    seconds = fit(ordinary, everything, **recipe, **ORDINARY).seconds
    score = accuracy(ordinary, scored.tokens, progress=False)
    results.add("ordinary", "fine-tuning, all images pooled", count, score, seconds)


def train_shards(
    prepared: Prepared, options: argparse.Namespace, results: Results
) -> Mapping[str, Delta]:
    """Train a delta for each shard, side by side; none sees another's images."""
    step(f"Tangent fine-tuning on {len(prepared.shards)} shards, side by side")
    tail = prepared.tail
    recipe: dict[str, Any] = {"epochs": options.epochs, "loss": LOSS, "seed": options.seed, **SHARD}
    named = {f"shard-{k}": part.tokens for k, part in enumerate(prepared.shards, start=1)}
    began = time.perf_counter()
    deltas = fit_grouped(tail, named, **recipe)
    seconds = (time.perf_counter() - began) / len(deltas)
    for name, part in zip(deltas, prepared.shards, strict=True):
        tail.load_delta_dict(deltas[name])
        score = accuracy(tail, prepared.scored.tokens, progress=False)
        count = len(part) + len(prepared.public)
        results.add("shard", f"{name} alone", count, score, seconds)
    return deltas


def compose_and_forget(
    prepared: Prepared,
    deltas: Mapping[str, Delta],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Add the deltas to a ledger, forget one, and compare with a ledger that never had it."""
    step(f"Compose the shards in a ledger; forget shard {options.forget}")
    tail, tokens = prepared.tail, prepared.scored.tokens
    targets, gone = prepared.scored.images.targets, f"shard-{options.forget}"
    count = len(prepared.public) + sum(map(len, prepared.shards))

    shutil.rmtree(options.out / "ledger", ignore_errors=True)
    began = time.perf_counter()
    ledger = Ledger(options.out / "ledger", anchor=tail)
    for name, delta in deltas.items():
        ledger.add(name, delta)
    tail.load_delta_dict(ledger.composed())
    seconds = time.perf_counter() - began
    composed = predict(tail, tokens, progress=False)
    score = hits(composed, targets)
    results.add("composed", f"{len(deltas)} shards composed", count, score, seconds)

    began = time.perf_counter()
    ledger.forget(gone, progress=False)
    tail.load_delta_dict(ledger.composed())
    seconds = time.perf_counter() - began
    after = predict(tail, tokens, progress=False)
    count -= len(prepared.shards[options.forget - 1])
    score = hits(after, targets)
    results.add("forgotten", f"{gone} forgotten", count, score, seconds)
    results.facts = [check_never(ledger, deltas, gone)]
    tail.load_delta_dict({name: torch.zeros_like(value) for name, value in deltas[gone].items()})
    anchor = predict(tail, tokens, progress=False)
    members = [targets == index for index in range(len(results.classes))]
    results.recalls = {
        kind: [hits(logits[rows], targets[rows]) for rows in members]
        for kind, logits in (("anchor", anchor), ("composed", composed), ("forgotten", after))
    }


def check_never(ledger: Ledger, deltas: Mapping[str, Delta], gone: str) -> str:
    """Compare with a ledger that never had the shard, bit for bit.

    Raises:
        DemoError: They differ.
    """
    path = ledger.path.with_name("ledger-never")
    shutil.rmtree(path, ignore_errors=True)
    never = Ledger(path)
    for name, delta in reversed([*deltas.items()]):
        if name != gone:
            never.add(name, delta)
    found, expected = ledger.composed(), never.composed()
    shutil.rmtree(path)
    if not all(torch.equal(found[name], expected[name]) for name in expected):
        raise DemoError(f"the composition without {gone} differs from that of the other shards")
    weights = sum(value.numel() for value in found.values())
    return (
        f"After {gone} was forgotten all {weights:,} weights are, bit for bit, those of a ledger "
        "that never had it."
    )


def hits(logits: Tensor, targets: Tensor) -> float:
    """Fraction of rows of `logits` (samples, classes) whose largest entry is the target's."""
    return float((logits.argmax(dim=1) == targets).double().mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    about = "Fine-tune a pre-trained ViT on shards of images, compose them, forget one."
    parser = parser_of(about, private=1200, shards=5)
    parser.set_defaults(image_size=70)  # 25 patches: half the work of 98
    add = parser.add_argument
    add("--epochs", type=int, default=6, help="passes over the data in every training")
    add("--own", type=float, default=0.6, help="share of a class that goes to its owner first")
    return run(demo, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
