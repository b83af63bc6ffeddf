"""RMS norm where PyTorch computes it by one kernel, as on CUDA; here a formula on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.ops import nestings, oracle
from tests.ops.dual_ops import OPS

NAMES = [name for name in OPS if "rms_norm" in name]


def forward(x: Tensor, shape, weight, eps) -> tuple[Tensor, Tensor]:
    rstd = (x.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).rsqrt()
    return x * rstd * (1.0 if weight is None else weight), rstd


def backward(grad: Tensor, x: Tensor, shape, rstd, weight, needs):
    grads = grad if weight is None else grad * weight
    along = (grads * x * rstd).mean(tuple(range(-len(shape), 0)), keepdim=True)
    by_x = rstd * (grads - x * rstd * along) if needs[0] else None
    by_weight = (grad * x * rstd).sum_to_size(shape) if needs[1] else None
    return by_x, by_weight


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`F.rms_norm` is the operator that it is on CUDA, with PyTorch's own derivatives of it."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", forward, "CPU")
    library.impl("_fused_rms_norm_backward", backward, "CPU")
    operator = torch.ops.aten._fused_rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *arguments: operator(*arguments)[0])
    yield
    library._destroy()


@pytest.mark.parametrize("case", nestings.CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_nestings(name, case, fused) -> None:
    op = OPS[name]
    primals, tangents = map(tuple, op.draw((2, 3), 8, dtype=torch.float64))
    others = tuple(op.draw((2, 3), 8, seed=1, dtype=torch.float64)[0])
    found = case(functools.partial(op.ours, backend="reference"), primals, tangents, others)
    exact = case(op.exact, primals, tangents, others)
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


def test_pytorchs_own_backward_pass_has_no_forward_mode(fused) -> None:
    """Otherwise `rms_norm` could leave these calls to PyTorch."""
    (x,), (x_t,) = OPS["rms_norm, no weight"].draw(dtype=torch.float64)
    own = OPS["rms_norm, no weight"].pytorchs
    with pytest.raises(NotImplementedError, match="forward AD with aten::_fused_rms_norm_backward"):
        nestings.backward_in_a_dual_level(own, (x,), (x_t,), (x,))
    found = oracle.pushforward(own, (x,), (x_t,))
    torch.testing.assert_close(
        found, oracle.pushforward(OPS["rms_norm, no weight"].exact, (x,), (x_t,))
    )
