"""For all test folders: long files run first, GPU tests only on a GPU, Ctrl-C stops the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where cores are shared.
torch.set_num_threads(1)


# These take longest, so they start first where processes share the files (`make test`).
FIRST = ("test_interpreted_", "test_run_shards.py", "test_ledger_crashes.py")


@pytest.hookimpl(trylast=True)  # after the folders' own hooks, which add the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(FIRST))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def ctrl_c_still_stops_the_run() -> Iterator[None]:
    """A SIGINT handler that a test leaves behind would turn Ctrl-C into one failed test."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    if after is not before:
        signal.signal(signal.SIGINT, before)
        pytest.fail(f"the test leaves another handler of SIGINT behind: {after}")
