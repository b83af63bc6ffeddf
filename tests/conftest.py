"""What every test folder shares: skipping GPU tests where there is no GPU."""

from __future__ import annotations

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where cores are shared.
torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # after the folders' own hooks, which add the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
