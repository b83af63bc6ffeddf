"""The suite as pytest-benchmark tests: one per case and provider, grouped by question.

    pytest benchmarks/ -k "attention-forward and ours" --benchmark-json=FILE

The providers of a case are measured together, in turns (`suite.measure`), when the first of them
comes up; each test then plays its own times to pytest-benchmark, whose statistics, JSON and
comparisons work as for any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.suite.case import Case, Provider
from benchmarks.suite.registry import workload_of
from benchmarks.suite.session import SESSION


class Tape:
    """A clock for pytest-benchmark that plays back durations; it is read before and after each."""

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._running = False

    def load(self, seconds: Sequence[float]) -> None:
        self._durations = list(reversed(seconds))

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else self._durations.pop()


TAPE = Tape()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.config.stash[SESSION].cases
    pairs = [(case, provider) for case in cases for provider in workload_of(case).providers(case)]
    ids = [f"{case.group} {case} {provider.name}".replace(" ", "-") for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.mark.benchmark(timer=TAPE)
def test_provider(request: pytest.FixtureRequest, case: Case, provider: Provider) -> None:
    together = selected(request.session.items, case)
    measured = request.config.stash[SESSION].measure(case, together)[provider.name]
    row = measured.row
    if row.status != "ok":
        ours = workload_of(case).providers(case)[0].name
        end = pytest.fail if provider.name == ours and row.status != "absent" else pytest.skip
        end(f"{row.status}: {row.note}")
    benchmark = request.getfixturevalue("benchmark")  # here: unused, it would warn
    benchmark.group = case.group
    benchmark.extra_info.update(case=str(case), provider=provider.name, error=row.error)
    TAPE.load(measured.seconds)
    benchmark.pedantic(lambda: None, rounds=len(measured.seconds))


def selected(items: Sequence[pytest.Item], case: Case) -> tuple[str, ...]:
    """The case's providers among the tests of this run."""
    params: list[Any] = [
        item.callspec.params for item in items if isinstance(item, pytest.Function)
    ]
    return tuple(some["provider"].name for some in params if some["case"] == case)
