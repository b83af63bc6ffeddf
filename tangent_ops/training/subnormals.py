"""Flushes subnormal numbers to zero while a model is trained on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FENV_BYTES = 64  # more than any fenv_t has


@contextmanager
def flushed_subnormals(device: torch.device) -> Iterator[None]:
    """Flush subnormal numbers to zero on a CPU, in this thread and PyTorch's threads of operations.

    Cross-entropy's gradient of a sample whose prediction is right and sure is subnormal (below
    1.2e-38 in float32). Next to other gradients, or to an optimizer's eps, it has no effect, but on
    many CPUs products of subnormal numbers are far slower than others.

    At the end, also after an error, all these threads get the setting that this thread had at the
    start. Threads of operations are reached through OpenMP's runtime (``GOMP_parallel``); where
    PyTorch has another one, as on macOS and Windows, only this thread flushes. Other devices and
    CPUs without this setting are left alone.
    """
    if device.type != "cpu":
        yield
        return
    before = _flushes()
    _set(True)
    try:
        yield
    finally:
        _set(before)


def _flushes() -> bool:
    """Whether this thread flushes; PyTorch cannot tell."""
    smallest_normal = sys.float_info.min
    return smallest_normal / 2 == 0


def _set(flush: bool) -> None:
    # The setting belongs to a thread. Threads inherit it when they start, so PyTorch's function is
    # too late for those that have started, and would last in those that start before the end.
    if not torch.set_flush_denormal(flush) or sys.platform == "win32":
        return
    libraries = ctypes.CDLL(None)
    if hasattr(libraries, "GOMP_parallel") and torch.get_num_threads() > 1:
        own = ctypes.create_string_buffer(_FENV_BYTES)
        libraries.fegetenv(own)
        libraries.GOMP_parallel(libraries.fesetenv, own, torch.get_num_threads(), 0)
