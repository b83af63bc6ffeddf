"""Kernels that are told apart but not compiled, so that launches are bound and counted at once."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import triton
from triton.compiler import CompiledKernel, make_backend


def count_only() -> None:
    """Let Triton take every kernel for compiled; to be called before the first launch."""
    triton.compiler.compile = _uncompiled  # type: ignore[attr-defined]


class Uncompiled(CompiledKernel):
    """A kernel that goes through Triton's binder and launcher, and has no machine code."""

    def __init__(self, source: Any, target: Any, options: dict[str, Any]):
        metadata = options | {
            "name": source.fn.__name__,
            "target": target,
            "shared": 0,
            "tmem_size": 0,
            "tensordesc_meta": None,
            "global_scratch_size": 0,
            "global_scratch_align": 1,
            "profile_scratch_size": 0,
            "profile_scratch_align": 1,
        }
        self.metadata = namedtuple("Metadata", metadata)(**metadata)
        backend: Any = make_backend(target)
        self.packed_metadata = backend.pack_metadata(self.metadata)
        self.src = source
        self.name = source.fn.__name__
        self.hash = source.hash()
        self.asm = {"cubin": b"none"}
        self.metadata_group = {}
        self.kernel = self.asm["cubin"]
        self.module = self.function = self._run = None


def _uncompiled(src: Any, target: Any = None, options: Any = None, **_: Any) -> Uncompiled:
    return Uncompiled(src, target, dict(options))
