"""Whether samples taken in turns show a change, or noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0  # the same samples get the same verdict

Word = Literal["slower", "faster", "same within noise"]


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        word: "slower" or "faster" if the interval lies beyond the tolerance.
        ratio: head's median over base's; 2 is twice as slow.
        lower: end of the ratio's confidence interval.
        upper: the other one.
    """

    word: Word
    ratio: float
    lower: float
    upper: float


def judge(base: Sequence[float], head: Sequence[float], tolerance: float) -> Verdict:
    """The verdict on seconds of single calls, the n-th of both taken one after the other.

    The interval is a percentile bootstrap of the median of the rounds' log ratios: a round's two
    calls share the machine's mood, and a median does not mind an interrupted call.

    Args:
        base: seconds of each round's call, before.
        head: and after.
        tolerance: relative change that is not worth a word; 0.03 is 3 %.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(base) != len(head) or not len(base):
        raise ValueError(f"{len(base)} and {len(head)} samples are no pairs: time both per round")
    before, after = np.asarray(base, dtype=float), np.asarray(head, dtype=float)
    logs = np.log(after / before)
    picks = np.random.default_rng(SEED).integers(len(logs), size=(RESAMPLES, len(logs)))
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(np.median(logs[picks], axis=1), [tail, 1 - tail])
    lower, upper = map(float, np.exp(ends))
    ratio = float(np.median(after) / np.median(before))
    word: Word = "same within noise"
    if lower > 1 + tolerance:
        word = "slower"
    elif upper < 1 - tolerance:
        word = "faster"
    return Verdict(word, ratio, lower, upper)
