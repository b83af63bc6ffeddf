"""What the kernels of norms, activations, softmax and linear refuse; the sanitizer's launches.

What they compute is in tests/ops/test_dual_ops.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from tangent_kernels.activation import activation_jvp

from tangent_ops import functional as ops
from tangent_ops.errors import UnsupportedError
from tests.ops import oracle
from tests.ops.contract import check
from tests.ops.dual_ops import OPS
from tools.kernels.sanitize_kernels import launch_rows


@pytest.mark.parametrize("name", ["gelu", "gelu, tanh", "silu"])
def test_activations_near_zero_and_far_out(name, device) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-4, -4.0, 8.0, -30.0, 50.0], device=device)
    ours = lambda x: OPS[name].ours(x, backend="triton")  # noqa: E731
    check(OPS[name], ours, [x], [torch.ones_like(x)], tracked=True)


def test_values_that_pytorch_has_not_written_to_memory(device) -> None:
    """A tensor that is negated lazily, and a tangent of lazy zeros, which has no memory."""
    negated = torch.ops.aten._neg_view
    x = negated(torch.randn(2, 8, device=device))
    zeros = torch.ops.aten._efficientzerotensor(x.shape, device=device)
    for x_t, written in ((negated(x), (-x).clone()), (zeros, torch.zeros_like(x).clone())):
        found = activation_jvp(x, x_t, "silu")
        exact = torch.func.jvp(torch.nn.functional.silu, *oracle.double(((x.clone(),), (written,))))
        for one, other in zip(found, exact, strict=True):
            assert oracle.error(one, other) < 1e-5


def test_what_the_kernels_do_not_compute_is_refused(device) -> None:
    x, wide = torch.randn(2, 3, device=device), torch.randn(1, 4097, device=device)
    for message, call, operand in (
        ("float64", ops.gelu, x.double()),
        ("4097 elements are longer than 4096", functools.partial(ops.softmax, dim=-1), wide),
        ("dim=0 is not the last", functools.partial(ops.softmax, dim=0), x),
    ):
        with pytest.raises(UnsupportedError, match=message):
            oracle.pushforward(functools.partial(call, backend="triton"), [operand], [operand])


def test_what_does_not_fit_is_not_read(device) -> None:
    """The kernels take a weight's address alone, and would read past its end."""
    x, line = torch.ones(2, 24, device=device), torch.ones(1, device=device)
    calls = [
        (lambda x, w: ops.layer_norm(x, (24,), w, backend="triton"), [x, line]),
        (lambda x, b: ops.layer_norm(x, (24,), None, b, backend="triton"), [x, line]),
        (lambda x: ops.layer_norm(x, (12,), backend="triton"), [x]),
        (lambda x, w: ops.rms_norm(x, (24,), w, backend="triton"), [x, line]),
        (lambda x: ops.rms_norm(x, (), backend="triton"), [x]),
    ]
    for call, operands in calls:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            oracle.pushforward(call, operands, operands)
    operands = [x, torch.ones(0, 24, device=device)]
    with pytest.raises(UnsupportedError, match="no elements"):
        oracle.pushforward(lambda *a: ops.linear(*a, backend="triton"), operands, operands)


def test_the_launches_of_the_sanitizer(device) -> None:
    launch_rows(70, torch.float16, device)
