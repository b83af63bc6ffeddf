"""All workloads, by group."""

from __future__ import annotations

import torch

from benchmarks.suite.attention import AttentionWorkload
from benchmarks.suite.case import Case, Extent, Provider, Workload
from benchmarks.suite.epochs import EpochWorkload
from benchmarks.suite.layers import LayerWorkload
from benchmarks.suite.models import ModelWorkload

WORKLOADS: tuple[Workload, ...] = (
    AttentionWorkload(),
    LayerWorkload(),
    ModelWorkload(),
    EpochWorkload(),
)


def workload_of(case: Case) -> Workload:
    """The workload that knows the case's group."""
    return next(workload for workload in WORKLOADS if case.group in workload.groups)


def all_cases(device: torch.device, extent: Extent) -> list[Case]:
    """Every case that fits the device, in the order of the workloads."""
    return [case for workload in WORKLOADS for case in workload.cases(device, extent)]


def provider_of(case: Case, name: str) -> Provider:
    """The case's provider of that name.

    Raises:
        KeyError: there is none; the message lists those there are.
    """
    providers = {provider.name: provider for provider in workload_of(case).providers(case)}
    if name not in providers:
        raise KeyError(f"{case}: no provider {name!r}; there are {', '.join(providers)}")
    return providers[name]
