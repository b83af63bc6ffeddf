"""The demo's second part: what linearity gives exactly, on the demo's own model and images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from assets import DemoError
from images import Images
from report import Results
from setting import Settings
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from tangent_ops import Ledger, LinearizedModel, accuracy, compose
from tangent_ops.delta import Delta
from tangent_ops.exact import (
    Certificate,
    Influence,
    Problem,
    compose_lossless,
    fit_exact,
    forget_samples,
)
from tangent_ops.exact.influence_grid import influence_grid

L2S = (3.0, 10.0, 30.0, 100.0)  # leave-one-out cross-validation chooses among them
RANK = 32  # of the preconditioner: there are few images


def forget_by_ledger(paths: Sequence[Path], settings: Settings) -> str:
    """Add all shards to a ledger, forget one, and compare with a ledger that never had it."""
    kept, never = (settings.out / name for name in ("ledger", "ledger-without"))
    for folder in (kept, never):
        shutil.rmtree(folder, ignore_errors=True)
    ledger, other = Ledger(kept), Ledger(never)
    for number, path in enumerate(paths, start=1):
        ledger.add(f"shard-{number}", path)
    for number, path in reversed([*enumerate(paths, start=1)]):
        if number != settings.forget:
            other.add(f"shard-{number}", path)
    began = time.perf_counter()
    ledger.forget(f"shard-{settings.forget}")
    seconds = time.perf_counter() - began
    after, expected = ledger.composed(), other.composed()
    if not all(torch.equal(after[name], expected[name]) for name in expected):
        raise DemoError("the ledger's composition remembers the forgotten shard")
    ledger.verify(progress=False)
    shutil.rmtree(never)
    weights = sum(value.numel() for value in after.values())
    return (
        f"Shard {settings.forget} forgotten by the ledger in {seconds:.1f} s: all {weights:,} "
        "weights of the composition are, bit for bit, those of a ledger that never had it."
    )


def run_exact(
    tangent: LinearizedModel,
    tail: LinearizedModel,
    shards: Sequence[Dataset],
    images: Sequence[Images],
    scored: Dataset,
    test: Images,
    results: Results,
    step: Callable[[str], None],
) -> None:
    """Fit, compose, forget and explain exactly, on the first images of every shard.

    Args:
        tangent: The whole model; the deltas are its and the tail's.
        tail: From tokens to logits.
        shards: Tokens and classes of every shard.
        images: The images of every shard.
        scored: Tokens and classes of the images to score on.
        test: The images to score on.
        results: Where what is found goes.
        step: Announces a step.
    """
    size = results.settings.exact
    parts = [Subset(shard, range(size)) for shard in shards]
    union = ConcatDataset(parts)
    total = len(union)
    options: dict[str, Any] = {"rank": RANK}

    def score(kind: str, name: str, count: int, seconds: float) -> None:
        found = accuracy(tail, scored)
        results.add_exact(kind, name, results.public + count, found, seconds)

    step(f"Exactly, on {size} images of each shard: what l2? Leave-one-out, without a refit")
    began = time.perf_counter()
    problem = Problem(tail, union, L2S[0])
    influence = Influence(problem)
    validation = influence.cross_validate(L2S)
    best = min(validation, key=lambda row: row.loss)
    influence.l2 = best.l2
    problem = problem.with_l2(best.l2)
    results.facts.append(
        f"Leave-one-out on {total} images chose l2 = {best.l2:g}: {len(L2S)} times {total} fits, "
        f"none of them run, in {time.perf_counter() - began:.0f} s."
    )

    step(f"The optimum on all {total} images, by conjugate gradients")
    _reset(tangent)
    report = fit_exact(problem, tol=0.02, **options)
    score("exact", f"exact fit, {total} images", total, report.seconds)
    whole = tangent.delta_dict()
    explain(influence, tail, scored, test, images, results)

    step("The optimum of every shard, and their composition without loss")
    deltas = []
    began = time.perf_counter()
    problems = [Problem(tail, part, best.l2, progress=False) for part in parts]
    for of_shard in problems:
        _reset(tangent)
        fit_exact(of_shard, tol=0.01, method="dual")
        deltas.append(tangent.delta_dict())
    seconds = time.perf_counter() - began
    mean = compose(deltas)
    tangent.load_delta_dict(mean)
    score("composed", f"mean of {len(parts)} exact fits of {size}", total, seconds)
    began = time.perf_counter()
    curvatures = [of_shard.curvature() for of_shard in problems]
    lossless = compose_lossless(deltas, curvatures, tol=1e-3)
    tangent.load_delta_dict(lossless)
    score("lossless", "their lossless composition", total, time.perf_counter() - began)
    results.facts.append(
        "The lossless composition of the shards' exact fits is "
        f"{distance(lossless, whole):.1%} from the exact fit on their union (both are solved to a "
        f"tolerance), their mean {distance(mean, whole):.0%}."
    )

    step(f"Forget shard {results.settings.forget}'s images, with a certificate")
    tangent.load_delta_dict(whole)
    first = (results.settings.forget - 1) * size
    began = time.perf_counter()
    delta, certificate = forget_samples(problem, range(first, first + size), tol=0.02, **options)
    seconds = time.perf_counter() - began
    score("forgotten", f"{size} images forgotten", total - size, seconds)
    results.facts.append(certified(certificate, delta, tail, scored))
    certificate.verify()
    path = results.settings.out / "certificate.json"
    path.write_text(certificate.to_json() + "\n", encoding="utf-8")


def explain(
    influence: Influence,
    tail: LinearizedModel,
    scored: Dataset,
    test: Images,
    images: Sequence[Images],
    results: Results,
) -> None:
    """Draw what helped and harmed the first image that the model gets wrong."""
    size = results.settings.exact
    wrong, logits = _first_wrong(tail, scored)
    tokens, target = scored[wrong]
    scores = influence.loss_change(tokens[None], torch.as_tensor(target)[None])[:, 0]
    names = test.classes

    def sample(index: int) -> tuple[Tensor, str]:
        shard = images[index // size]
        image, label = shard.data[index % size]
        return image, names[int(label)]

    # Twice the loss by output, of each image by the fit without it, is the noise's variance.
    (validation,) = influence.cross_validate([influence.l2])
    noise = 2 * validation.loss / logits.numel()
    sure = influence.covariance(tokens[None], noise)[0].diagonal().sqrt()
    caption = f"{names[int(target)]}, taken for {names[int(logits.argmax())]}"
    results.influence = influence_grid((test.data[wrong][0], caption), sample, scores)
    worst = int(scores.argmin())
    results.facts.append(
        f"Of {len(scores)} training images, {int((scores > 0).sum())} helped one image that is "
        f"taken for a {names[int(logits.argmax())]}; without the most harmful one, a "
        f"{sample(worst)[1]}, its loss would be {-float(scores[worst]):.2g} lower: exactly, "
        "without training again."
    )
    pair = [int(logits.argmax()), int(target)]
    said = " and ".join(f"{logits[c]:.1f} ± {sure[c]:.1f} for {names[c]}" for c in pair)
    results.facts.append(
        f"The model's logits for that image: {said} (one posterior standard deviation)."
    )


def certified(
    certificate: Certificate, delta: Delta, tail: LinearizedModel, scored: Dataset
) -> str:
    """What the certificate says, in a sentence."""
    size = float(sum(value.double().square().sum() for value in delta.values())) ** 0.5
    logits = float(certificate.logit_bound(tail, scored[0][0][None]).max())
    return (
        f"Certificate: what is left is at most {certificate.distance_bound / size:.1%} of ‖Δ‖ from "
        f"retraining without the forgotten images, and on a first image at most {logits:.2g} in "
        "any logit; verified."
    )


def distance(delta: Delta, other: Delta) -> float:
    """‖Δ - Δ'‖ / ‖Δ'‖."""
    off = sum((delta[name] - other[name]).double().square().sum() for name in other)
    size = sum(value.double().square().sum() for value in other.values())
    return float((off / size) ** 0.5)


def _first_wrong(tail: LinearizedModel, scored: Dataset) -> tuple[int, Tensor]:
    with torch.no_grad():
        for index in range(len(scored)):  # pyright: ignore[reportArgumentType]
            tokens, target = scored[index]
            logits = tail(tokens[None])[0]
            if int(logits.argmax()) != int(target):
                return index, logits
    raise DemoError("the model gets every image right: there is nothing to explain")


def _reset(tangent: LinearizedModel) -> None:
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.zero_()
