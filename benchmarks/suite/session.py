"""One run of the suite: what it has measured so far, and where it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from benchmarks.record import environment
from benchmarks.roofline import measure_ceilings
from benchmarks.suite.case import Case, Extent
from benchmarks.suite.measure import Measured, measure
from benchmarks.suite.memory import MemoryProbe
from benchmarks.suite.registry import all_cases
from benchmarks.suite.row import Result


class Session:
    """Measures each case once, all its providers together, and remembers.

    Args:
        device: where.
        extent: which cases there are.
        budget: seconds for the timed rounds of a case.
    """

    def __init__(self, device: torch.device, extent: Extent, budget: float):
        self.device = device
        self.cases = all_cases(device, extent)
        self._budget = budget
        self._measured: dict[Case, dict[str, Measured]] = {}
        self._ceilings: Mapping[str, float] = {}
        self._open = ExitStack()
        self._probe: MemoryProbe | None = None

    def measure(self, case: Case, providers: Sequence[str]) -> dict[str, Measured]:
        """What the providers take; measured at the first call for the case."""
        if self._probe is None:
            self._probe = self._open.enter_context(MemoryProbe(self.device))
            self._ceilings = measure_ceilings(self.device)
        if case not in self._measured:
            found = measure(case, providers, self.device, self._budget)
            for name, one in found.items():
                memory = self._probe.ask(case, name) if one.row.status == "ok" else None
                if memory is not None:
                    row = replace(one.row, peak_bytes=memory[0], saved_bytes=memory[1])
                    found[name] = replace(one, row=row)
            self._measured[case] = found
        return self._measured[case]

    def result(self) -> Result:
        """Everything measured."""
        rows = [one.row for found in self._measured.values() for one in found.values()]
        return Result(environment(self.device), self._ceilings, rows)

    def close(self) -> None:
        self._open.close()


SESSION = pytest.StashKey[Session]()
