"""Deltas, an oracle for their weighted mean, and tools that damage or kill a ledger."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tangent_ops import Delta, DeltaMeta, Ledger
from tangent_ops.errors import LedgerError

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


SHARDS = {"a": (some_delta(1), 1.0), "b": (some_delta(2), 2.5)}


def assert_same(found: Delta, expected: Delta) -> None:
    assert found.keys() == expected.keys()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert torch.equal(found[name].signbit(), value.signbit())
    assert found.meta == expected.meta


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


def tree(path: Path) -> dict[str, str]:
    """Relative path of each file in a folder -> SHA-256 of its content."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def assert_tidy(ledger: Ledger) -> None:
    """The folder holds one file per shard, at most one sum, and no log of SQLite."""
    assert sorted(os.listdir(ledger.path)) == ["deltas", "ledger.sqlite", "sums"]
    assert len(os.listdir(ledger.path / "deltas")) == len(ledger)
    assert len(os.listdir(ledger.path / "sums")) <= 1


def fork(work: Callable[[], object]) -> int:
    """Starts a child that calls `work` and exits with 0, or 1 after an error; returns its id."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn about threads; the child gives ours no work.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Waits for a child; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def delta_file(ledger: Ledger, shard: str) -> Path:
    with ledger._records.reading() as transaction:
        row = transaction.shard(shard)
    assert row is not None
    return ledger.path / "deltas" / row.seal.name


def sum_file(ledger: Ledger) -> Path:
    with ledger._records.reading() as transaction:
        row = transaction.sum()
    assert row is not None
    return ledger.path / "sums" / row.name


def edit_database(ledger: Ledger, *statements: str) -> None:
    with closing(sqlite3.connect(ledger.path / "ledger.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def refused(
    where: Ledger | Path,
    message: str,
    *works: Callable[[], object],
    error: type[BaseException] = LedgerError,
) -> None:
    """Each call of `works` raises the error and changes no file."""
    path = where.path if isinstance(where, Ledger) else where
    before = tree(path)
    for work in works:
        with pytest.raises(error, match=message):
            work()
        assert tree(path) == before


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
