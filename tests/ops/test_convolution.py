"""A convolution skips the product of a zero tangent; all else is in test_dual_ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops import fused_forward_ad
from tests.ops.dual_ops import OPS
from tests.ops.oracle import pushforward


def test_a_plain_input_costs_two_products() -> None:
    """PyTorch's rule convolves zeros as well: three."""
    op = OPS["convolution, patches"]
    primals, tangents = op.draw()
    counts = []
    for context in (fused_forward_ad(), torch.no_grad()):
        with torch.no_grad(), context, FlopCounterMode(display=False) as counter:
            pushforward(lambda *a: F.conv2d(*a, stride=4), primals, [None, *tangents[1:]])
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as plain:
        F.conv2d(*primals, stride=4)
    assert counts == [2 * plain.get_total_flops(), 3 * plain.get_total_flops()]
