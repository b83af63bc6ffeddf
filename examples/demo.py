"""Train shards of real images apart, add them up without loss, forget a shard and one image.

    python examples/demo.py --help

With a square loss, a fit in a fixed core is determined by sums over samples. So the statistics of
any shards add up to those of the union, and what is subtracted leaves no trace.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

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
    step,
)
from picture import Results, draw, duration, print_table
from running import run
from torch.utils.data import ConcatDataset, Dataset, Subset

from tangent_ops import (
    LinearizedModel,
    StatisticsLedger,
    TangentStatistics,
    accuracy,
    compose,
    core_basis,
    fit,
    linearize,
    statistics,
)
from tangent_ops.exact import Problem, fit_exact
from tangent_ops.model.features import split_model
from tangent_ops.pictures import save

T = TypeVar("T")
Deals = Mapping[int, Sequence[Dataset[Any]]]  # number of shards -> their images

# Chosen at 98 px, from 1e-4 and 3e-4, by scores on images of MNIST-5k that are no test images of
# seed 0.
ORDINARY: dict[str, Any] = {"epochs": 6, "lr": 3e-4}
L2 = 0.3  # of the fits of all parameters; from 0.3 and 1, at 70 px, by validation images as above
TOLERANCE = 0.03  # of these fits


def demo(options: argparse.Namespace) -> None:
    """Run the demo; write ``demo.png``, its numbers and a ledger to the output folder."""
    began = time.perf_counter()
    model, images = load(options)
    parts = deal(images, options)

    step("Compute what enters the last block, once for all that follows")
    prepared = prepare(model, parts, options.seed)
    private = sum(map(len, prepared.shards))
    results = Results(
        model=f"{model_name(model)}, last block and head trained",
        setting=f"{images.name}: {len(prepared.public)} public and {private} private images, "
        f"{len(prepared.scored)} {options.score_on} images; seed {options.seed}",
        scored=options.score_on,
    )
    dealt = deals(prepared, options)
    train_jointly(prepared, len(images.classes), options, results)
    average_deltas(prepared, dealt, results)
    core, owners = add_statistics(prepared, dealt, options, results)
    forget(prepared, core, owners, options, results)

    results.seconds = time.perf_counter() - began
    print_table(results.model, results.setting, results.rows, results.facts, console)
    results.write(options.out / "demo.json")
    path = save(draw(results), options.out / "demo.png")
    console.print(f"\n  wrote {path} and {options.out / 'ledger'}; {results.seconds:.0f} s in all")


def deals(prepared: Prepared, options: argparse.Namespace) -> Deals:
    """The private images as one shard, by owner, and in many random shards.

    Raises:
        DemoError: The number of random shards is out of range.
    """
    owners = [part.tokens for part in prepared.shards]
    count = sum(map(len, owners))
    if not len(owners) < options.many <= count:
        raise DemoError(
            f"--many {options.many}: expected more than --shards, {len(owners)}, and at most the "
            f"{count} private images"
        )
    union: Dataset[Any] = ConcatDataset(owners)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(count, generator=generator)
    many = [Subset(union, part.tolist()) for part in order.tensor_split(options.many)]
    return {1: [union], len(owners): owners, options.many: many}


def train_jointly(
    prepared: Prepared, classes: int, options: argparse.Namespace, results: Results
) -> None:
    """Train on all images pooled; to forget one of them takes training again."""
    step("All images pooled: a linear head, and ordinary fine-tuning of the last block")
    tail, scored = prepared.tail, prepared.scored
    everything = ConcatDataset([part.tokens for part in (prepared.public, *prepared.shards)])
    features = ConcatDataset([part.features for part in (prepared.public, *prepared.shards)])

    score = accuracy(tail, scored.tokens, progress=False)
    results.add("anchor", "head only, public images", len(prepared.public), score, prepared.seconds)
    head, seconds = probe(features, classes, options.seed)
    score = accuracy(head, scored.features, progress=False)
    results.add("head", "head only, all images", len(features), score, seconds)
    blocks = len(prepared.anchor.blocks)
    ordinary = split_model(copy.deepcopy(prepared.anchor), blocks - 1)[1].requires_grad_(True)
    seconds = fit(ordinary, everything, loss=LOSS, seed=options.seed, **ORDINARY).seconds
    score = accuracy(ordinary, scored.tokens, progress=False)
    results.add("ordinary", "ordinary fine-tuning, all images", len(everything), score, seconds)


def average_deltas(prepared: Prepared, dealt: Deals, results: Results) -> None:
    """Fit a delta to each shard, all parameters to their optimum; compose them by their mean."""
    tail, scored = prepared.tail, prepared.scored
    count = len(prepared.public) + sum(map(len, prepared.shards))
    for number, shards in dealt.items():
        step(f"Tangent fine-tuning of all parameters on {shards_of(number)}, and the mean")
        began = time.perf_counter()
        deltas = []
        for shard in shards:
            tail.zero_()
            fit_exact(Problem(tail, shard, L2, progress=False), tol=TOLERANCE)
            deltas.append(tail.delta_dict())
        tail.load_delta_dict(compose(deltas))
        seconds = time.perf_counter() - began
        score = accuracy(tail, scored.tokens, progress=False)
        name = "tangent fine-tuning, all images"
        name = f"mean of {number} shards' deltas" if number > 1 else name
        results.add("mean", name, count, score, seconds, shards=number)


def add_statistics(
    prepared: Prepared, dealt: Deals, options: argparse.Namespace, results: Results
) -> tuple[LinearizedModel, Sequence[TangentStatistics]]:
    """Sum every deal's statistics and solve; give the model with a core, and those by owner.

    Raises:
        DemoError: The sums depend on the deal.
    """
    step("A core from the public images")
    anchor = prepared.tail.anchor
    core = linearize(anchor, core=core_basis(anchor, prepared.public.tokens, options.core))
    scored, count = prepared.scored, len(prepared.public) + sum(map(len, prepared.shards))
    owners, sums = [], []
    for number, shards in dealt.items():
        step(f"Statistics of {shards_of(number)}: a pass over the images each, no training")
        began = time.perf_counter()
        each = [statistics(core, shard, progress=False) for shard in shards]
        sums.append(reduce(add, each))
        core.load_delta_dict(sums[-1].choose().delta)  # l2 by cross-validation
        seconds = time.perf_counter() - began
        score = accuracy(core, scored.tokens, progress=False)
        name = f"statistics of {shards_of(number)}"
        results.add("statistics", name, count, score, seconds, shards=number)
        owners = each if number == len(prepared.shards) else owners
    for total in sums[1:]:
        check_same(total, sums[0], "the sum of the statistics of some shards")
    results.facts.append(
        f"The statistics of {', '.join(map(str, dealt))} shards have the same sums, bit for bit."
    )
    return core, owners


def forget(
    prepared: Prepared,
    core: LinearizedModel,
    owners: Sequence[TangentStatistics],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Put the owners' statistics into a ledger; forget one image, then all of its shard.

    Raises:
        DemoError: What is left is not what the other images alone give.
    """
    step(f"A ledger of {len(owners)} shards: forget an image of shard {options.forget}, then all")
    shutil.rmtree(options.out / "ledger", ignore_errors=True)
    ledger = StatisticsLedger(options.out / "ledger", anchor=core)
    for number, one in enumerate(owners, start=1):
        ledger.add(f"shard-{number}", one)
    gone, tokens = f"shard-{options.forget}", prepared.shards[options.forget - 1].tokens
    first, rest = Subset(tokens, [0]), Subset(tokens, range(1, len(tokens)))
    others = [one for number, one in enumerate(owners, start=1) if number != options.forget]

    def forget_image() -> None:
        ledger.forget_samples(gone, statistics(core, first, progress=False))

    for kind, name, work, never in (
        ("image", f"one image of shard {options.forget}", forget_image,
         [statistics(core, rest, progress=False), *others]),
        ("shard", f"shard {options.forget}", lambda: ledger.forget(gone), others),
    ):  # fmt: skip
        _, of_ledger = timed(work)
        _, of_solve = timed(lambda: core.load_delta_dict(ledger.choose().delta))
        left = ledger.statistics()
        check_same(left, reduce(add, reversed(never)), f"what is left without {name}")
        score = accuracy(core, prepared.scored.tokens, progress=False)
        count = len(prepared.public) + len(left)
        results.add(f"no {kind}", f"{name} forgotten", count, score, of_ledger, of_solve)
        sums = sum(term.numel() for term in left.terms.values())
        results.facts.append(
            f"After {name} was forgotten, in {duration(of_ledger)}, all {sums:,} sums are, bit for "
            f"bit, those of the other images alone. The solve takes {duration(of_solve)} more."
        )


def check_same(found: TangentStatistics, expected: TangentStatistics, what: str) -> None:
    """Compare sums bit for bit.

    Raises:
        DemoError: They differ.
    """
    if found != expected:
        raise DemoError(f"{what} differs in {', '.join(found.differences(expected))}")


def shards_of(number: int) -> str:
    """The number with its noun."""
    return f"{number} shard{'s' * (number > 1)}"


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the seconds that it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    about = "Train shards of images apart, add them up without loss, forget a shard and one image."
    parser = parser_of(about, private=1200, shards=5)
    parser.set_defaults(image_size=70)  # 25 patches: half the work of 98
    add_option = parser.add_argument
    add_option("--many", type=int, default=50, help="number of random shards of the same images")
    add_option("--core", type=int, default=8, help="rows and columns of each layer's core")
    add_option("--own", type=float, default=0.6, help="share of a class that its owner has first")
    return run(demo, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
