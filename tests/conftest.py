"""For all test folders: long files run first, others where they can run, Ctrl-C stops the run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tangent_ops.ops.backend import interpreting

# Tiny tensors gain nothing from threads, and lose a lot where cores are shared.
torch.set_num_threads(1)
# On a GPU too, float32 is compared with float64; PyTorch's products are in float32 by default.
torch.backends.cudnn.allow_tf32 = False


# Tests that kill and forget write through to the disk, which takes longer than all else in them.
# Memory survives a killed process as a disk does. A container may have a few megabytes of it.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# These take longest, so they start first where processes share the files (`make test`).
FIRST = (
    "test_attention_matrix.py",
    "test_attention_kernels.py",
    "test_dual_ops.py",
    "test_compiled_kernels.py",
    "test_run_shards.py",
    "test_ledger_crashes.py",
    "test_study_quick.py",
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Interpreted, files without a test that runs then are not imported."""
    if not interpreting() or collection_path.suffix != ".py":
        return None
    named = "triton" in collection_path.read_text(encoding="utf-8")
    return None if named or collection_path.parent.name == "kernels" else True


@pytest.hookimpl(trylast=True)  # after the folders' own hooks, which add the marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
    if interpreting():  # the other tests want compiled kernels, or none
        config.hook.pytest_deselected(items=[i for i in items if "triton" not in i.keywords])
        items[:] = [item for item in items if "triton" in item.keywords]
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_kernels = pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
        elif "triton" in item.keywords and not interpreting():
            item.add_marker(no_kernels)


def pytest_collection_finish() -> None:
    """Garbage is looked for among the tests' own objects, not all those of the imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ctrl_c_still_stops_the_run() -> Iterator[None]:
    """A SIGINT handler that a test leaves behind would turn Ctrl-C into one failed test."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    if after is not before:
        signal.signal(signal.SIGINT, before)
        pytest.fail(f"the test leaves another handler of SIGINT behind: {after}")
