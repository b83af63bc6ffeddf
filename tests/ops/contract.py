"""The contract of an operation: values, tangents and gradients against those in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops import oracle
from tests.ops.dual_ops import Op

# A few hundred roundings, of results and of intermediates of size 1.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def pushed(function, primals, tangents, level: bool) -> tuple[Tensor, Tensor]:
    """Output and its tangent, in a plain dual level or by torch.func.jvp."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    p, t = [primals[i] for i in moving], [tangents[i] for i in moving]
    of = oracle.of_some(function, primals, moving)

    if not level:
        return torch.func.jvp(of, tuple(p), tuple(t))[:2]
    with forward_ad.dual_level():
        output, output_t = forward_ad.unpack_dual(of(*map(forward_ad.make_dual, p, t)))
        return output, torch.zeros_like(output) if output_t is None else output_t


def derivatives(function, primals, tangents, tracked: bool, level: bool):
    """Output, its tangent, and gradients by the tangents, and by primals if ``tracked``."""
    # No clone(): it would make strided operands dense.
    primals = [p.detach().requires_grad_(tracked) for p in primals]
    tangents = [None if t is None else t.detach().requires_grad_() for t in tangents]
    results = pushed(function, primals, tangents, level)
    if not tracked:  # or the next layer would treat its primal as trained
        assert not results[0].requires_grad
    source = torch.Generator().manual_seed(9)
    loss: Any = 0.0
    for y in results:
        weight = torch.randn(y.shape, generator=source, dtype=torch.float64).to(y)
        if y.requires_grad:
            loss = loss + (y * weight).sum()
    leaves = [*(t for t in tangents if t is not None), *(primals if tracked else [])]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in results], list(grads)


def check(
    op: Op, ours, primals, tangents, tracked: bool, level: bool | None = None, **close: float
) -> None:
    """Values, tangents and gradients are right.

    Args:
        op: the oracle, in float64; its PyTorch function sets the rounding that is allowed.
        ours: the function under test, of the operands.
        primals: its operands.
        tangents: of each, or None where absent.
        tracked: gradients by the primals, too.
        level: in a dual level, or by torch.func.jvp; None for a level where primals are frozen.
        **close: rtol and atol of float64, if not CLOSE's.
    """
    level = not tracked if level is None else level
    found = derivatives(ours, primals, tangents, tracked, level)
    wide = oracle.double(primals), oracle.double(tangents)
    exact = derivatives(op.exact, *wide, tracked, False)
    dtype = primals[0].dtype
    assert all(x.dtype == dtype for x in (*found[0], *found[1]))
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, **(CLOSE[dtype] | close))
    else:
        function = op.exact if tracked else op.pytorchs
        eager = derivatives(function, primals, tangents, tracked, False)
        oracle.assert_as_good_as(found, exact, eager)
