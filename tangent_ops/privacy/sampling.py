"""Poisson sampling: each sample is drawn for a step independently, with the same probability."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, ...]


class PoissonBatches(Sampler[list[int]]):
    """The batches of all steps, as lists of indices; a list may be empty.

    With a key, a step's batch depends on the key and the step only. So a resumed run draws the same
    batches as an uninterrupted one, and the processes of a group share a batch without
    communication: each takes every world-th of its samples. Opacus' distributed sampler draws
    separately in each process and skips empty batches, so its processes take different steps.

    Args:
        samples: N.
        rate: q, the probability.
        steps: T.
        key: the seed of the draws; None draws from `os.urandom`.
        start: the first step to yield.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        samples: int,
        rate: float,
        steps: int,
        key: Key | None,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.samples = samples
        self.rate = rate
        self.steps = steps
        self.key = key
        self.start = start
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            (drawn,) = np.nonzero(self._uniform(step) < self.rate)
            yield drawn[self.rank :: self.world].tolist()

    def _uniform(self, step: int) -> np.ndarray:
        if self.key is not None:
            return np.random.default_rng([*self.key, step]).random(self.samples)
        bits = np.frombuffer(os.urandom(8 * self.samples), dtype=np.uint64)
        return (bits >> np.uint64(11)) * 2.0**-53
