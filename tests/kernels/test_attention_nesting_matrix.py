"""Every pair of transforms on a GPU or interpreted: right, or it raises by name."""

from __future__ import annotations

import pytest
import torch

from tangent_ops.ops.backend import interpreting
from tests.ops.transforms import CELLS, title
from tests.ops.write_nestings import check

# torch's own: vmap loops where its fast attention has no batching rule; linearize folds constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

BACKENDS = ["triton"] if interpreting() else ["triton", "default"]  # on a CPU: in tests/ops


@pytest.mark.parametrize("cell", CELLS, ids=title)
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_or_raises_by_name(backend, cell, device) -> None:
    check(cell, backend, torch.float32, device)
