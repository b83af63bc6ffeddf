"""Every pair of transforms on a CPU: right, or it raises by name, as docs/nestings.md says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.ops.transforms import CELLS, SHAPE, outcome, plain_cell, title, value
from tools.pages.nestings import check

# torch's own: vmap loops where its fast attention has no batching rule; linearize folds constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


@pytest.mark.parametrize("cell", CELLS, ids=title)
@pytest.mark.parametrize("backend", ["default", "reference"])
def test_right_or_raises_by_name(backend, cell) -> None:
    found = check(cell, backend, torch.float64, "cpu")
    if backend == "reference" and found not in ("right", "pytorch"):
        assert found == outcome(cell, oracle.math_attention)  # the limit is PyTorch's own


@pytest.mark.parametrize("cell", sorted({plain_cell(cell) for cell in CELLS}), ids=title)
def test_the_oracle_agrees_with_attention_spelled_out(cell) -> None:
    def spelled_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT * query.shape[-1] ** -0.5).exp()
        return weights / weights.sum(-1, keepdim=True) @ value

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, exact = (value(cell, op, x) for op in (spelled_out, oracle.math_attention))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [("jvp",), ("autocast", "jvp"), ("jvp", "grad")], ids=title)
def test_a_lost_tangent_is_seen(cell) -> None:
    def forgetful(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return oracle.math_attention(query, key.detach(), value)

    assert outcome(cell, forgetful).startswith("wrong")
