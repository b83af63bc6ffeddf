"""What every test folder shares: long files first, and no GPU tests where there is no GPU."""

from __future__ import annotations

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where cores are shared.
torch.set_num_threads(1)


# Files of minutes, started first where files are shared out over processes (`make test`).
LONG = ("test_interpreted_", "test_study_quick.py", "test_transcript.py")


@pytest.hookimpl(trylast=True)  # after the folders' own hooks, which add the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
