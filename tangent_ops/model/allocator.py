"""Lets glibc's malloc keep the memory that one step frees for the next step."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

SWITCH = "TANGENT_OPS_KEEP_MEMORY"

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # <malloc.h>
_SETTINGS = ("mmap_max", "mmap_threshold", "top_pad", "trim_threshold")


@functools.cache
def keep_memory() -> bool:
    """Set glibc's malloc, once, to keep what this process frees; whether it does.

    By default glibc returns large freed blocks to the system. A step then gets its memory anew,
    page by page, which can take longer than its arithmetic. A `LinearizedModel` that runs on a CPU
    calls this, and so do `fit` and `cache_features`; compiled models do not. The setting holds for
    all threads, and for ordinary models in this process, too.

    The process's resident memory then stays at its peak; glibc's ``malloc_trim(0)`` returns what is
    free. Memory from other allocators is not concerned. The environment can forbid it:
    ``TANGENT_OPS_KEEP_MEMORY=0`` does, and so do glibc's own settings of the same thresholds
    (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES=glibc.malloc.trim_threshold=...``), which stay.

    Returns:
        False if nothing was set: no Linux, another C library, or the environment forbids it.
    """
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or _set_by_user():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # No block comes from mmap, whatever its size, and no free memory at the heap's end is returned.
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables
        for name in _SETTINGS
    )
