"""The routed functions on PyTorch's own samples: value, tangent and its gradient.

The samples are the installed torch's (``op_db``), which PyTorch tests its derivatives with.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import unittest
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from tangent_ops import fused_forward_ad
from tests.ops import oracle

SAMPLES = 8  # of each function, spread over all that there are

FUNCTIONS = [
    "softmax",
    *(
        f"nn.functional.{name}"
        for name in (
            "conv1d",
            "conv2d",
            "conv3d",
            "gelu",
            "glu",
            "hardsigmoid",
            "layer_norm",
            "linear",
            "multi_head_attention_forward",
            "normalize",
            "rms_norm",
            "scaled_dot_product_attention",
            "silu",
        )
    ),
]


@functools.cache
def op_infos() -> dict[str, Any]:
    """PyTorch's descriptions of its functions, in float64; importing them takes seconds."""
    if importlib.util.find_spec("expecttest") is None:  # their base class, unused here
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        vars(sys.modules["expecttest"])["TestCase"] = unittest.TestCase
    flags = torch.backends.flags_frozen.__globals__
    frozen = "__allow_nonbracketed_mutation_flag"
    before = flags[frozen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    flags[frozen] = before  # the import freezes torch.backends.*.enabled for the whole process
    return {info.name: info for info in op_db if not info.variant_test_name}


def samples(name: str) -> list[Any]:
    torch.manual_seed(0)
    every = list(op_infos()[name].sample_inputs("cpu", torch.float64, requires_grad=False))
    every = [s for s in every if not s.kwargs.get("dropout_p")]  # random
    return every[:: -(-len(every) // SAMPLES)]


class Call:
    """A function of the floating-point tensors of a sample."""

    def __init__(self, op, sample) -> None:
        leaves, self.spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.op, self.leaves = op, leaves
        self.at = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype.is_floating_point
        ]
        self.primals = [leaves[i] for i in self.at]

    def __call__(self, *operands):
        leaves = list(self.leaves)
        for i, x in zip(self.at, operands, strict=True):
            leaves[i] = x
        input, args, kwargs = tree_unflatten(leaves, self.spec)
        output = self.op(input, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def of(self, moving):
        return oracle.of_some(self, self.primals, moving)

    def subsets(self) -> set[tuple[int, ...]]:
        """Which operands have a tangent: all, and each alone."""
        count = len(self.primals)
        return {tuple(range(count)), *((i,) for i in range(count))}


def cotangent(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), dtype=like.dtype).cos().reshape(like.shape)


def derivatives(call: Call, moving, level: bool):
    """Value and tangent of the routed function, and gradients of the tangent by tangents."""
    primals = [call.primals[i] for i in moving]
    leaves = [(2 * p).cos().requires_grad_() for p in primals]
    with fused_forward_ad():
        if level:
            output, output_t = oracle.pushforward(call.of(moving), primals, leaves)
            output_t = torch.zeros_like(output) if output_t is None else output_t
        else:
            output, output_t = torch.func.jvp(call.of(moving), tuple(primals), tuple(leaves))
    grads = [torch.zeros_like(x) for x in leaves]
    if output_t.requires_grad:
        loss = (output_t * cotangent(output)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [output.detach(), output_t.detach(), *grads]


def exact_derivatives(call: Call, moving):
    """By PyTorch: forward mode for the tangent, reverse mode of the value for its gradients."""
    primals = tuple(call.primals[i] for i in moving)
    tangents = tuple((2 * p).cos() for p in primals)
    with sdpa_kernel(SDPBackend.MATH):
        output, output_t = torch.func.jvp(call.of(moving), primals, tangents)
        output, pull_back = torch.func.vjp(call.of(moving), *primals)
        return [output, output_t, *pull_back(cotangent(output))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples(name) -> None:
    # A rounding of float64, some hundreds of terms each; PyTorch's hardsigmoid has 1/6 in float32.
    rtol = 2**-24 if name.endswith("hardsigmoid") else 1e-10
    chosen = samples(name)
    assert chosen
    for sample in chosen:
        call = Call(op_infos()[name].op, sample)
        for moving in call.subsets():
            exact = exact_derivatives(call, moving)
            for level in (True, False):
                found = derivatives(call, moving, level)
                torch.testing.assert_close(found, exact, rtol=rtol, atol=1e-11)
