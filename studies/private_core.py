"""Private training of a core against a private probe, both in coordinates from public images.

    python -m studies.private_core emoji

The options were chosen by public validation images; see `OPTIONS`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from assets import default_cache

from studies.paper.methods import probe, with_head
from studies.paper.tokens import FEATURES, class_token_tail, load_model, prepare
from tangent_ops import LinearizedModel, linearize
from tangent_ops.delta import Delta
from tangent_ops.model.core_basis import core_basis
from tangent_ops.model.features import CachedFeatures, Tail
from tangent_ops.privacy import (
    FeatureBounds,
    GroupClips,
    Privacy,
    PublicCoordinates,
    fit_noisy_descent,
    noisy_statistics,
    public_coordinates,
)

DELTA = 1e-5
PUBLIC = 100
SEEDS = 5


@dataclass(frozen=True)
class Descent:
    """Options of `fit_noisy_descent`.

    Attributes:
        core: directions of the core.
        head: directions of the head's input.
        steps: T.
        lr: of the steps.
        quantile: of the public gradients' norms, for the clips.
        l2: the penalty.
    """

    core: int
    head: int
    steps: int
    lr: float
    quantile: float
    l2: float

    def fit(
        self,
        tangent: LinearizedModel,
        data: CachedFeatures,
        where: PublicCoordinates,
        epsilon: float,
        seed: int,
    ) -> Delta:
        core, head = where.norms.core_gradient, where.norms.head_gradient
        clips = GroupClips(
            float(core.quantile(self.quantile)) if self.core else None,
            float(head.quantile(self.quantile)),
            core_share=0.3,
        )
        privacy = Privacy(delta=DELTA, target_epsilon=epsilon, steps=self.steps, seed=seed)
        options = {"lr": self.lr, "l2": self.l2, "progress": False}
        return fit_noisy_descent(tangent, data, privacy, where, clips, **options).delta


@dataclass(frozen=True)
class Statistics:
    """Options of `noisy_statistics`.

    Attributes:
        core: directions of the core.
        head: directions of the head's input.
        quantile: of the public norms, for the bounds.
        l2: the ridge; None for AdaSSP's.
    """

    core: int
    head: int
    quantile: float
    l2: float | None

    def fit(
        self,
        tangent: LinearizedModel,
        data: CachedFeatures,
        where: PublicCoordinates,
        epsilon: float,
        seed: int,
    ) -> Delta:
        norms = where.norms
        bounds = FeatureBounds(
            float(norms.core.quantile(self.quantile)) if self.core else None,
            float(norms.head.quantile(self.quantile)),
            float(norms.residual.quantile(self.quantile)),
        )
        privacy = Privacy(delta=DELTA, target_epsilon=epsilon, seed=seed)
        released = noisy_statistics(tangent, data, privacy, where, bounds, progress=False)
        return released.solve(self.l2)


# Chosen for each ε by the mean accuracy on public validation images, seeds 0 to 4, from grids of
# one size for core and probe. Choosing by private runs costs privacy that ε does not count.
OPTIONS: dict[str, dict[str, dict[float, Descent | Statistics]]] = {
    "emoji": {
        "descent, core": {
            1.0: Descent(256, 96, steps=4, lr=0.4, quantile=0.5, l2=0.3),
            3.0: Descent(256, 192, steps=10, lr=0.2, quantile=0.5, l2=0.1),
            8.0: Descent(256, 192, steps=10, lr=0.2, quantile=0.9, l2=0.0),
        },
        "descent, probe": {
            1.0: Descent(0, 96, steps=4, lr=0.4, quantile=0.5, l2=0.3),
            3.0: Descent(0, 192, steps=4, lr=0.4, quantile=0.9, l2=0.0),
            8.0: Descent(0, 192, steps=4, lr=0.4, quantile=0.9, l2=0.0),
        },
        "statistics (AdaSSP), core": {
            1.0: Statistics(16, 32, quantile=0.5, l2=10.0),
            3.0: Statistics(16, 32, quantile=0.5, l2=1.0),
            8.0: Statistics(32, 32, quantile=0.9, l2=3.0),
        },
        "statistics (AdaSSP), probe": {
            1.0: Statistics(0, 32, quantile=0.5, l2=None),
            3.0: Statistics(0, 32, quantile=0.9, l2=1.0),
            8.0: Statistics(0, 64, quantile=0.9, l2=0.3),
        },
    },
}


def start(name: str, seed: int, private: int, validation: int, cache: Path):
    """The anchor, whose head is a probe of the public images, and the images' tokens."""
    prepared = prepare(name, (1,), cache)
    public, trained, _ = prepared.drawn(seed, [PUBLIC, private, validation])
    classes = len(prepared.classes)
    tail = class_token_tail(load_model(cache), 1, classes)
    anchor = with_head(tail, probe(prepared.rows(FEATURES, public), classes, "square", seed))
    once = without_repetitions(prepared.rows(1, trained))
    return anchor, prepared.rows(1, public), once, prepared.tested(1)


def without_repetitions(data: CachedFeatures) -> CachedFeatures:
    """The first of all images that are the same, bit for bit."""
    first = {row.numpy().tobytes(): index for index, row in reversed([*enumerate(data.features)])}
    kept = torch.tensor(sorted(first.values()))
    return CachedFeatures(data.features[kept], data.targets[kept])


def tangents(anchor: Tail, public: CachedFeatures) -> dict[bool, LinearizedModel]:
    """The head alone, and the last block's core beside it."""
    core = linearize(anchor, core=core_basis(anchor, public, size=8))
    return {False: linearize(anchor, r"^head\."), True: core}


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: CachedFeatures) -> float:
    """In percent."""
    right = sum(
        int((model(inputs).argmax(1) == targets).sum())
        for inputs, targets in torch.utils.data.DataLoader(data, 100)
    )
    return 100 * right / len(data)


def main(arguments: list[str] | None = None) -> None:
    """Run all methods, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", choices=sorted(OPTIONS))
    parser.add_argument("--private", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=136)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--cache", type=Path, default=default_cache())
    given = parser.parse_args(arguments)
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(given.seeds):
        began = time.perf_counter()
        anchor, public, private, tested = start(
            given.images, seed, given.private, given.validation, given.cache
        )
        models = tangents(anchor, public)
        found.setdefault(("public probe", 0.0), []).append(accuracy(anchor, tested))
        for method, options in OPTIONS[given.images].items():
            for epsilon, one in options.items():
                tangent = models[bool(one.core)]
                tangent.zero_()
                where = public_coordinates(
                    tangent, public, core=one.core, head=one.head, progress=False
                )
                tangent.load_delta_dict(one.fit(tangent, private, where, epsilon, seed))
                found.setdefault((method, epsilon), []).append(accuracy(tangent, tested))
        accuracies = " ".join(f"{values[-1]:.1f}" for values in found.values())
        seconds = time.perf_counter() - began
        print(f"seed {seed}, {len(private)} images, {seconds:.0f} s: {accuracies}", flush=True)
    for (method, epsilon), values in found.items():
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{method:30} {epsilon or '':>4} {mean(values):5.1f} ± {error:.1f}")


if __name__ == "__main__":
    main()
