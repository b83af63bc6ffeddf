"""Show what linearity gives exactly, on the demo's model and 1,000 real images.

    python examples/exact_demo.py --help

With a square loss and an l2 penalty the fine-tuning of a tangent model is ridge regression. So its
optimum is found to a known tolerance, the optima of shards compose without loss, samples are
forgotten with a certificate, and the influence of each sample is known without a refit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from assets import DemoError
from common import (
    LOSS,
    Part,
    Prepared,
    console,
    deal,
    load,
    model_name,
    parser_of,
    prepare,
    step,
)
from picture import Row, print_table
from running import run
from torch import Tensor
from torch.utils.data import ConcatDataset

from tangent_ops import LinearizedModel, accuracy, compose
from tangent_ops.delta import Delta
from tangent_ops.exact import (
    Influence,
    Problem,
    compose_lossless,
    first_order_scores,
    fit_exact,
    forget_samples,
    leave_one_out,
    predictive_covariance,
)
from tangent_ops.exact.influence_grid import influence_grid
from tangent_ops.pictures import save

T = TypeVar("T")
L2S = (3.0, 10.0, 30.0)  # leave-one-out cross-validation chooses among them
MOST = 3  # training images whose removal is computed exactly, of each sign
TOLERANCE = 0.02  # of the solves for an explanation: its figures are shown with two digits


def demo(options: argparse.Namespace) -> None:
    """Run the demo; write ``influence.png`` and ``certificate.json`` to the output folder."""
    model, images = load(options)
    prepared = prepare(model, deal(images, options), options.seed)
    tail, shards = prepared.tail, [part.tokens for part in prepared.shards]
    union: Any = ConcatDataset(shards)
    facts: list[str] = []
    rows: list[Row] = []

    def score(kind: str, name: str, count: int, seconds: float) -> None:
        found = accuracy(tail, prepared.scored.tokens, progress=False)
        rows.append(Row(kind, name, count + len(prepared.public), found, seconds))

    score("anchor", "head only, public images", 0, prepared.seconds)
    step("Choose l2 by leave-one-out in every shard, without a refit")
    began = time.perf_counter()
    problems = [Problem(tail, shard, L2S[0], progress=False) for shard in shards]
    noises, l2 = choose(problems)
    problems = [one.with_l2(l2) for one in problems]
    facts.append(
        f"Leave-one-out in {len(shards)} shards chose l2 = {l2:g}: the losses of {len(L2S)} times "
        f"{len(union)} fits, none of which was run, in {time.perf_counter() - began:.1f} s."
    )

    step(f"Fit all {len(union)} images to the optimum")
    problem = Problem(tail, union, l2)
    report = fit_exact(problem)
    score("exact", f"exact fit of {len(union)} images", len(union), report.seconds)
    whole = tail.delta_dict()
    facts += explain(problem, noises[l2], prepared, options)

    step("Fit every shard to its optimum, and compose without loss")
    deltas = []
    began = time.perf_counter()
    for one in problems:
        tail.zero_()
        fit_exact(one)
        deltas.append(tail.delta_dict())
    mean = compose(deltas)
    tail.load_delta_dict(mean)
    score("exact", f"mean of {len(shards)} exact fits", len(union), time.perf_counter() - began)
    began = time.perf_counter()
    lossless = compose_lossless(deltas, [one.curvature() for one in problems], tol=1e-3)
    tail.load_delta_dict(lossless)
    score("exact", "their lossless composition", len(union), time.perf_counter() - began)
    facts.append(
        "The lossless composition of the shards' exact fits is "
        f"{distance(lossless, whole):.1%} from the exact fit of their union (both are solved to a "
        f"tolerance), their mean {distance(mean, whole):.0%}."
    )

    step(f"Forget the images of shard {options.forget}, with a certificate")
    tail.load_delta_dict(whole)
    gone = shards[options.forget - 1]
    first_of_gone = sum(len(shard) for shard in shards[: options.forget - 1])
    ids = range(first_of_gone, first_of_gone + len(gone))
    (delta, certificate), seconds = timed(lambda: forget_samples(problem, ids))
    score("forgotten", f"{len(gone)} images forgotten", len(union) - len(gone), seconds)
    certificate.verify(problem.without(ids), delta)
    (options.out / "certificate.json").write_text(certificate.to_json() + "\n", encoding="utf-8")
    first = prepared.scored.tokens[0][0][None]
    facts.append(
        f"Certificate: the delta is at most {certificate.distance_bound / norm(delta):.1%} of ‖Δ‖ "
        "from that of retraining without the forgotten images, and no logit of the first image "
        f"is off by more than {float(certificate.logit_bound(tail, first).max()):.2g}; verified."
    )
    setting = f"{images.name}: {len(shards)} shards of {len(gone)} images, seed {options.seed}"
    print_table(model_name(model), setting, rows, facts, console)
    console.print(f"\n  wrote influence.png and certificate.json to {options.out}")


def choose(problems: Sequence[Problem]) -> tuple[dict[float, float], float]:
    """Leave every image out of its shard's fit, for every l2.

    Returns:
        An estimate of the noise's variance for each l2, and the l2 with the least loss.
    """
    totals = dict.fromkeys(L2S, 0.0)
    for problem in problems:
        for row in Influence(problem).cross_validate(L2S):
            totals[row.l2] += row.loss * problem.samples
    images = sum(problem.samples for problem in problems)
    # Twice the leave-one-out loss per output estimates the variance.
    noises = {l2: 2 * total / images / problems[0].outputs for l2, total in totals.items()}
    return noises, min(totals, key=lambda l2: totals[l2])


def explain(
    problem: Problem, noise: float, prepared: Prepared, options: argparse.Namespace
) -> list[str]:
    """Draw what helped and what harmed the first image that the model gets wrong."""
    tail, scored, shards = prepared.tail, prepared.scored, prepared.shards
    names = scored.images.classes
    wrong, logits = first_wrong(tail, scored)
    tokens, target = scored.tokens[wrong]
    target, taken = int(target), int(logits.argmax())
    queries, targets = tokens[None], torch.tensor([target])
    ranks = first_order_scores(problem, queries, targets, tol=TOLERANCE)[:, 0]
    helped = int((ranks > 0).sum())
    # The exact change of the few that matter most; the others stay out of the picture.
    order = ranks.argsort().tolist()
    few = order[:MOST] + order[-MOST:]
    changes = leave_one_out(problem, few, queries, tol=TOLERANCE)[:, 0]
    before = float(LOSS(logits[None].double(), targets))
    scores = torch.zeros_like(ranks)
    for index, change in zip(few, changes, strict=True):
        scores[index] = float(LOSS((logits + change.float())[None].double(), targets)) - before
    private: Any = ConcatDataset([shard.images.data for shard in shards])

    def sample(index: int) -> tuple[Tensor, str]:
        image, label = private[index]
        return image, names[int(label)]

    caption = f"{names[target]}, taken for {names[taken]}"
    figure = influence_grid((scored.images.data[wrong][0], caption), sample, scores, MOST)
    save(figure, options.out / "influence.png")
    sure = predictive_covariance(problem, queries, noise, tol=TOLERANCE)[0].diagonal().sqrt()
    said = " and ".join(f"{logits[c]:.1f} ± {sure[c]:.1f} for {names[c]}" for c in (taken, target))
    worst = int(scores.argmin())
    return [
        f"Of {len(scores)} training images, {helped} helped one image of class "
        f"{names[target]}, taken for {names[taken]}; without the most harmful one, of class "
        f"{sample(worst)[1]}, its loss would be {-float(scores[worst]):.2g} lower: exactly, "
        "without training again.",
        f"The model's logits for that image: {said} (one posterior standard deviation).",
    ]


def first_wrong(tail: LinearizedModel, scored: Part) -> tuple[int, Tensor]:
    """Find the first scored image that the model gets wrong; give its index and logits."""
    with torch.no_grad():
        for index in range(len(scored)):
            tokens, target = scored.tokens[index]
            logits = tail(tokens[None])[0]
            if int(logits.argmax()) != int(target):
                return index, logits
    raise DemoError("the model gets every image right: there is nothing to explain")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do some work; give its result and the seconds."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def norm(delta: Delta) -> float:
    """‖Δ‖."""
    return float(sum(value.double().square().sum() for value in delta.values())) ** 0.5


def distance(delta: Delta, other: Delta) -> float:
    """‖Δ - Δ'‖ / ‖Δ'‖."""
    return norm(Delta({name: delta[name] - other[name] for name in other}, None)) / norm(other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    about = "Fit, compose, forget and explain exactly, on 1,000 images."
    parser = parser_of(about, private=1000, shards=5)
    parser.set_defaults(scored=400)
    return run(demo, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
