"""Fine-tune a real pre-trained ViT on shards of real images, compose them, forget one.

    python examples/shards_demo.py --help

What may have to be forgotten must not be in the anchor: a composition keeps f(x; w0), whatever is
taken out of it. So the anchor's head is a linear probe of *public* images, which are in no shard.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from assets import VIT_SMALL, DemoError, default_cache, fetch
from backbone import load_backbone, load_timm
from checks import check_last_one, check_mean
from exact import forget_by_ledger, run_exact
from images import Images, load_images
from report import Results, Sample, print_table, write_report
from rich.console import Console
from rich.markup import escape
from setting import Settings, split_images
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from tangent_ops import (
    accuracy,
    cache_features,
    compose,
    fit,
    fit_head,
    last_blocks,
    linearize,
    predict,
    save_delta,
)
from tangent_ops.errors import TangentOpsError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import split_model

# Learning rates, chosen for each kind of training on the validation images of MNIST-5k (seed 0)
# from 1e-4, 2e-4, 3e-4 and 5e-4, as far as they were tried. The test images had no say.
ORDINARY: dict[str, Any] = {"lr": 3e-4}
TANGENT: dict[str, Any] = {"lr": 5e-4}
SHARD: dict[str, Any] = {"lr": 2e-4, "batch_size": 16}  # few images: more and smaller steps
PROBE_EPOCHS = 30  # they are cheap: the probe's features are computed once
LOSS = RescaledSquareLoss()

console = Console()


def run(model: Any, images: Images, settings: Settings) -> Results:
    """Run the experiment, step by step.

    Args:
        model: A timm vision transformer with one output per class.
        images: What to train and score on.
        settings: The options; deltas are written to ``settings.out / "deltas"``.

    Returns:
        What the report shows.
    """
    start = time.perf_counter()
    split = split_images(images, settings)
    targets = split.scored.targets
    public, private = len(split.public.targets), len(split.shards[0].targets)
    everything = public + settings.shards * private
    results = Results(images.name, model_name(model), settings, public, private, len(targets))
    probing: dict[str, Any] = {"num_classes": len(images.classes), "epochs": PROBE_EPOCHS}
    recipe: dict[str, Any] = {"epochs": settings.epochs}
    probing |= {"loss": LOSS, "seed": settings.seed}
    recipe |= {"loss": LOSS, "seed": settings.seed}

    step("Linear probes: of the public images (the anchor), and of all training images")
    joined = ConcatDataset([split.public.data, *(shard.data for shard in split.shards)])
    anchored, anchor_fit = fit_head(model, split.public.data, **probing)
    probed, probe_fit = fit_head(model, joined, **probing)

    step("Linearize at the anchor; compute what enters the last block, once for everything below")
    tangent = linearize(anchored, last_blocks(anchored, 1))
    trunk, tail = tangent.split()
    zero = tangent.delta_dict()
    tokens = cache_features(trunk, DataLoader(ConcatDataset([joined, split.scored.data]), 64))
    bounds = [public + k * private for k in range(settings.shards + 1)]
    shards = [tokens.subset(range(a, b)) for a, b in pairwise(bounds)]
    training = tokens.subset(range(everything))
    scored = tokens.subset(range(everything, len(tokens)))

    def tail_of(network: Any) -> nn.Module:
        return split_model(network, len(network.blocks) - 1)[1]

    score = accuracy(tail_of(anchored), scored)
    results.add("anchor", "probe, public images", public, score, anchor_fit.seconds)
    score = accuracy(tail_of(probed), scored)
    results.add("probe", "probe, all images", everything, score, probe_fit.seconds)

    step(f"Ordinary fine-tuning of the last block on all {everything} training images")
    ordinary = tail_of(copy.deepcopy(anchored)).requires_grad_(True)
    seconds = fit(ordinary, training, **recipe, **ORDINARY).seconds
    score = accuracy(ordinary, scored)
    results.add("ordinary", "fine-tuning, all images", everything, score, seconds)

    step(f"TAFT-1: tangent fine-tuning of the last block on all {everything} training images")
    seconds = fit(tail, training, **recipe, **TANGENT).seconds
    score = accuracy(tail, scored)
    results.add("tangent", "TAFT-1, all images", everything, score, seconds)

    step(f"TAFT-1 on {settings.shards} shards of {private} images, each on its own")
    paths, logits = [], []
    folder = settings.out / "deltas"
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, start=1):
        tangent.load_delta_dict(zero)
        seconds = fit(tail, shard, **recipe, **SHARD).seconds
        delta = tangent.delta_dict()
        assert delta.meta is not None
        path = folder / f"shard-{number}.safetensors"
        save_delta(delta, path, meta=replace(delta.meta, loss=repr(LOSS), shard=str(number)))
        paths.append(path)
        logits.append(predict(tail, scored))
        score = hits(logits[-1], targets)
        results.add("shard", f"TAFT-1, shard {number} alone", public + private, score, seconds)
    results.delta_bytes = paths[0].stat().st_size

    step("Compose the shards from their files; forget each in turn by composing the others")
    began = time.perf_counter()
    tangent.load_delta_dict(compose(paths))
    seconds = time.perf_counter() - began
    composed = predict(tail, scored)
    score = hits(composed, targets)
    results.add("composed", f"mean of the {settings.shards} shards", everything, score, seconds)
    own = [predict(tail, shard) for shard in shards]
    for k, (shard, labelled) in enumerate(zip(shards, split.shards, strict=True)):
        began = time.perf_counter()
        tangent.load_delta_dict(compose(paths[:k] + paths[k + 1 :]))
        seconds = time.perf_counter() - began
        after = predict(tail, shard)
        # On the scored images the mean of the others' outputs is known: the model is linear.
        others = torch.stack(logits[:k] + logits[k + 1 :]).mean(dim=0)
        results.own_loss.append(
            float(LOSS(after, labelled.targets) - LOSS(own[k], labelled.targets))
        )
        results.other_loss.append(float(LOSS(others, targets) - LOSS(composed, targets)))
        if k + 1 == settings.forget:
            score = accuracy(tail, scored)
            results.add(
                "forgotten", f"shard {k + 1} forgotten", everything - private, score, seconds
            )
            results.samples = changed(labelled, own[k], after)

    step("Check what linearity promises")
    results.facts = [
        check_mean(composed, logits),
        check_last_one(tangent, tail, scored, paths, logits, settings.forget),
    ]
    results.facts.append(forget_by_ledger(paths, settings))
    if settings.exact:
        run_exact(tangent, tail, shards, split.shards, scored, split.scored, results, step)
    results.seconds = time.perf_counter() - start
    return results


def hits(logits: Tensor, targets: Tensor) -> float:
    """Fraction of rows of `logits` (samples, classes) whose largest entry is the target's."""
    return float((logits.argmax(dim=1) == targets).double().mean())


def changed(shard: Images, before: Tensor, after: Tensor, at_most: int = 8) -> list[Sample]:
    """Images of a shard that logits `before` had right and logits `after` have wrong."""
    was, now = before.argmax(dim=1), after.argmax(dim=1)
    lost = ((was == shard.targets) & (now != shard.targets)).nonzero().flatten().tolist()
    return [
        Sample(shard.data[i][0], shard.classes[int(was[i])], shard.classes[int(now[i])])
        for i in lost[:at_most]
    ]


def step(title: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{title}[/bold]")


def model_name(model: Any) -> str:
    """The architecture and, if the weights are not timm's, where they come from."""
    name = model.pretrained_cfg["architecture"]
    tag = model.pretrained_cfg.get("tag")
    return f"{name}, {tag}" if tag else name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a pre-trained ViT on shards of images, compose them, forget one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="mnist", help="mnist, digits, or a folder with a sub-folder per class")
    add("--model", help="a timm model with published weights instead of the ViT-S/14 from pip")
    add("--shards", type=int, default=5, help="parts the private images are dealt into")
    add("--forget", type=int, default=3, help="the shard to forget, from 1")
    add("--epochs", type=int, default=6, help="passes over the data in every training")
    add("--train-size", type=int, default=1200, help="training images; a sixth are public")
    add("--seed", type=int, default=0, help="of the split and of the order of the samples")
    add("--score-on", choices=("test", "validation"), default="test", help="images to score on")
    add("--out", type=Path, default=Path("out"), help="folder for the report and the deltas")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    add("--exact", type=int, default=16, help="images of each shard for the exact part; 0: none")
    add("--quick", action="store_true", help="few images, 3 passes: to see that it runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    options = parse(arguments)
    try:
        settings = Settings(
            out=options.out,
            shards=options.shards,
            forget=options.forget,
            epochs=3 if options.quick else options.epochs,
            train_size=360 if options.quick else options.train_size,
            test_size=200 if options.quick else 1000,
            seed=options.seed,
            score_on=options.score_on,
            exact=min(options.exact, 10) if options.quick else options.exact,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        step("Model and images")
        torch.manual_seed(settings.seed)
        model = (
            load_timm(options.model)
            if options.model
            else load_backbone(fetch(VIT_SMALL, options.cache))
        )
        images = load_images(options.data, resolve_model_data_config(model), options.cache)
        console.print(f"{model_name(model)}; {images.name}, {len(images.classes)} classes")
        results = run(model, images, settings)
    except (DemoError, TangentOpsError) as error:
        Console(stderr=True).print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False
        )
        return 2
    print_table(results, console)
    for path in write_report(results):
        console.print(f"  wrote {path}", highlight=False)
    console.print(f"  {results.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
