"""Freed memory stays with the process: settings of malloc, and page faults, in fresh processes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tangent_ops.model import allocator
from tangent_ops.model.allocator import keep_memory

STEPS = """
import json, resource, sys
sys.path[:0] = {paths!r}
import torch
from torch import nn
from tangent_ops import linearize

torch.set_num_threads(1)
anchor = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64))
tangent = linearize(anchor, check=False)
inputs = torch.randn(3000, 64)  # 47 MiB of hidden activations


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def step():
    tangent(inputs).square().mean().backward()


windows = []  # the heap grows in the first ones
for _ in range(4):
    before = faults()
    for _ in range(3):
        step()
    windows.append(faults() - before)
print(json.dumps(min(windows)))
"""


class Libc(SimpleNamespace):
    """A C library that notes the settings of malloc."""

    def __init__(self, **functions: Any) -> None:
        super().__init__(**functions)
        self.settings: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.settings.append((name, value))
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libc]:
    glibc = Libc(gnu_get_libc_version=lambda: b"2.36")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_", "TANGENT_OPS_")):
            monkeypatch.delenv(name)
    keep_memory.cache_clear()
    yield glibc
    keep_memory.cache_clear()


def test_malloc_is_set_once(libc: Libc) -> None:
    assert keep_memory() and keep_memory()
    assert libc.settings == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD


@pytest.mark.parametrize(
    "environment",
    [
        {"TANGENT_OPS_KEEP_MEMORY": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.top_pad=0"},
    ],
)
def test_the_environment_forbids_it(
    libc: Libc, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not keep_memory()
    assert libc.settings == []


def test_other_settings_of_malloc_do_not_forbid_it(
    libc: Libc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert keep_memory()


def test_another_c_library_is_left_alone(libc: Libc, monkeypatch: pytest.MonkeyPatch) -> None:
    del libc.gnu_get_libc_version
    assert not keep_memory()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    keep_memory.cache_clear()
    assert not keep_memory()
    assert libc.settings == []


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="only glibc is set",
)
def test_a_repeated_step_has_few_page_faults() -> None:
    kept, returned = _page_faults({}), _page_faults({"TANGENT_OPS_KEEP_MEMORY": "0"})
    assert returned > 20_000  # else the steps are too small to show anything
    assert 10 * kept < returned


def _page_faults(environment: dict[str, str]) -> int:
    """The fewest page faults of three steps in a row, in a process of its own."""
    own = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-W", "ignore", "-c", STEPS.format(paths=sys.path)]
    ran = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)
