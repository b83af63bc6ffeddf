"""How far the providers of a case are from the exact answer."""

from __future__ import annotations

import torch

from benchmarks.suite.case import Case, Workload
from benchmarks.suite.measure import relative_error

CPU = torch.device("cpu")


def errors(workload: Workload, case: Case) -> dict[str, float | None]:
    """Of every provider that is not absent: its error in units of what it is allowed.

    None: it gives nothing to compare.
    """
    inputs = workload.inputs(case, CPU, 0)
    exact = workload.expected(case, inputs)
    found = {}
    for provider in workload.providers(case):
        if provider.why_not(case, CPU) is None:
            outputs = workload.compared(case, provider.prepare(case, inputs)())
            error = relative_error(outputs, exact)
            allowed = workload.bound(case) * provider.slack
            found[provider.name] = None if error is None else error / allowed
    return found


def scaled(function, factor: float, index: int | None = None):
    """A faulty ``function``: its result, or the one at ``index``, is multiplied."""

    def faulty(*args):
        found = function(*args)
        if index is None:
            return found * factor
        return tuple(x * factor if i == index else x for i, x in enumerate(found))

    return faulty
