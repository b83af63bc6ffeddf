"""Shards of ledgers of both kinds, by a seed, and oracles for their sums."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import torch

from tangent_ops import Delta, DeltaMeta, Ledger, StatisticsLedger, TangentStatistics
from tangent_ops.composition.statistics import StatisticsMeta

AnyLedger = Ledger | StatisticsLedger

# The name of the folder of shards' files.
FOLDERS = {Ledger: "deltas", StatisticsLedger: "statistics"}


# Shards of either kind


def add(ledger: AnyLedger, shard: str, seed: int, meta=None) -> None:
    """Adds the shard that a seed gives."""
    if isinstance(ledger, Ledger):
        ledger.add(shard, some_delta(seed), weight_of(seed), meta)
    else:
        ledger.add(shard, some_statistics(seed), meta)


def result(ledger: AnyLedger) -> Delta | TangentStatistics:
    """What the ledger gives for all its shards."""
    return ledger.composed() if isinstance(ledger, Ledger) else ledger.statistics()


def assert_holds(ledger: AnyLedger, seeds: Iterable[int]) -> None:
    """The result is that of the shards with these seeds."""
    if isinstance(ledger, Ledger):
        assert_is(ledger.composed(), [(some_delta(seed), weight_of(seed)) for seed in seeds])
    else:
        assert_has(ledger, [number for seed in seeds for number in numbers_of(seed)])


def assert_same(found: Delta | TangentStatistics, expected: Delta | TangentStatistics) -> None:
    if isinstance(found, TangentStatistics):
        assert found == expected
        return
    assert isinstance(expected, Delta)
    assert found.keys() == expected.keys()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert torch.equal(found[name].signbit(), value.signbit())
    assert found.meta == expected.meta


# Deltas

META = DeltaMeta("a" * 64, "tiny", "head", loss="square")
SHAPES = {"head.weight": (3, 4), "head.bias": (3,), "scale": ()}
DTYPES = {"head.weight": torch.float32, "head.bias": torch.float64, "scale": torch.bfloat16}


def some_delta(seed: int, meta: DeltaMeta | None = META) -> Delta:
    """Values of many magnitudes, some of them zero or far below the resolution."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in SHAPES.items():
        exponents = torch.randint(-44, 8, shape, generator=generator).double()
        values[name] = (torch.randn(shape, generator=generator) * exponents.exp2()).to(DTYPES[name])
    return Delta(values, meta and replace(meta, shard=str(seed)))


def weight_of(seed: int) -> float:
    """1, 2.5, 4, ...; positive for every seed."""
    return (1.5 * seed - 0.5) % 10.5


def oracle(shards: Iterable[tuple[Delta, float]]) -> dict[str, torch.Tensor]:
    """The weighted mean in Python's integers and fractions, rounded as documented."""
    shards = list(shards)
    total = float(sum(Fraction(weight) for _, weight in shards))
    mean = {}
    for name in sorted(SHAPES):
        flat = [delta[name].double().reshape(-1).tolist() for delta, _ in shards]
        values = []
        for column in zip(*flat, strict=True):
            terms = (
                round(Fraction(value * weight) * 2**40)
                for value, (_, weight) in zip(column, shards, strict=True)
            )
            values.append(float(sum(terms)) / 2**40 / total)
        exact = torch.tensor(values, dtype=torch.float64).reshape(SHAPES[name])
        mean[name] = exact.to(DTYPES[name])
    return mean


def assert_is(found: Delta, shards: Iterable[tuple[Delta, float]]) -> None:
    expected = oracle(shards)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# Statistics, of samples that have numbers

SAMPLES = 3  # of a shard
LAYOUT = (("core", "float32", (5,)), ("head.weight", "float32", (3, 2)), ("head.bias", "float32", (3,)))  # fmt: skip
STATISTICS_META = StatisticsMeta(
    replace(META, basis="c" * 64), LAYOUT, ("head.weight", "head.bias"), outputs=3
)


def numbers_of(seed: int) -> range:
    """The numbers of the samples in the shard of a seed."""
    return range(SAMPLES * seed, SAMPLES * (seed + 1))


def some_statistics(seed: int, meta: StatisticsMeta = STATISTICS_META) -> TangentStatistics:
    return statistics_of(numbers_of(seed), meta)


def statistics_of(
    numbers: Iterable[int], meta: StatisticsMeta = STATISTICS_META
) -> TangentStatistics:
    samples = [_sample(number) for number in numbers]
    terms = {
        name: torch.stack([sample[name] for sample in samples]).sum(0) for name in meta.shapes()
    }
    counts = torch.bincount(torch.tensor([sample["label"] for sample in samples]), minlength=3)
    digests = torch.tensor(sorted(sample["digest"] for sample in samples))
    return TangentStatistics(
        meta, terms, counts, sum(int(sample["reach"]) for sample in samples), digests
    )


@functools.cache
def _sample(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    terms = {
        name: torch.randint(-(2**40), 2**40, shape, generator=generator)
        for name, shape in STATISTICS_META.shapes().items()
    }
    for name in ("core_core", "head_head"):
        terms[name] += terms[name].T.clone()
    digest = hashlib.sha256(str(number).encode()).digest()
    halves = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
    reach = max(int(term.abs().max()) for term in terms.values())
    return {**terms, "label": number % 3, "digest": halves, "reach": reach}


def assert_has(ledger: StatisticsLedger, numbers: Iterable[int]) -> None:
    """The ledger's statistics are those of these samples, added up in Python's integers."""
    samples = [_sample(number) for number in numbers]
    found = ledger.statistics()
    assert found.meta == STATISTICS_META and found.digests is None
    for name, shape in STATISTICS_META.shapes().items():
        columns = zip(*(sample[name].reshape(-1).tolist() for sample in samples), strict=True)
        expected = torch.tensor([sum(column) for column in columns]).reshape(shape)
        assert torch.equal(found.terms[name], expected)
    labels = [sample["label"] for sample in samples]
    assert found.counts.tolist() == [labels.count(label) for label in range(3)]
    assert found.reach == sum(sample["reach"] for sample in samples)
