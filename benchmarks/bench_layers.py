"""Single layers: output and tangent, alone or with the tangent's gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ops
from benchmarks.case import Call, Case, Cost, Extent, Outputs, Provider, Suite, compiling_is_slow
from benchmarks.ops import Op, Operands, Pair, Tensors, call_of, in_dual_level
from benchmarks.roofline import linear_cost, row_cost
from tangent_ops import fused_forward_ad

STEP = "-step"  # ends the name of an op whose tangents' gradients are computed, too
EPS = 1e-5
# Rows (images times tokens), width and MLP width of a ViT at 224 pixels in patches of 16.
VIT_SMALL, VIT_LARGE_ON_CPU = (8 * 197, 384, 1536), (8 * 197, 1024, 4096)
VIT_BASE, VIT_LARGE = (64 * 197, 768, 3072), (64 * 197, 1024, 4096)


@dataclass(frozen=True)
class Layer:
    """A layer by PyTorch's functions."""

    # Its parameters are named after its operands: input (rows, width), weight and bias (width,); of
    # linear (rows, inner), (outer, inner), (outer,).
    op: Op
    wide: bool  # whether the width is the MLP's
    always: bool  # whether it is measured by default, not in extent "full" alone


LAYERS: dict[str, Layer] = {}


def layer(wide: bool = False, always: bool = False) -> Callable[[Op], Op]:
    """Registers the decorated function as a layer of that name."""

    def register(op: Any) -> Op:
        LAYERS[op.__name__] = Layer(op, wide, always)
        return op

    return register


@layer(always=True)
def layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias, EPS)


@layer(wide=True, always=True)
def gelu(input: Tensor) -> Tensor:
    return F.gelu(input)


@layer()
def rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(input, weight.shape, weight, EPS)


@layer()
def softmax(input: Tensor) -> Tensor:
    return F.softmax(input, -1)


@layer(wide=True)
def silu(input: Tensor) -> Tensor:
    return F.silu(input)


@layer(always=True)
def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(input, weight, bias)


class LayerSuite(Suite):
    """Shapes are (rows, width), of linear (rows, inner, outer).

    A provider's function takes the layer's function, primals (inputs and parameters) and tangents,
    and gives output and tangent; one whose question is "primal" takes no tangents (None) and gives
    the output. Results are these; of a step: the output, the gradients of the tangents of input and
    parameters, and the output's tangent.
    """

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        cpu, full = device.type == "cpu", extent == "full"
        sizes, dtypes = [VIT_SMALL if cpu else VIT_BASE], ["fp32" if cpu else "bf16"]
        if full:
            sizes.append(VIT_LARGE_ON_CPU if cpu else VIT_LARGE)
            dtypes += ["bf16"] if cpu else ["fp16", "fp32"]
        return [
            Case("linear" if name == "linear" else "elementwise", name + suffix, shape, dtype)
            for name, one in LAYERS.items()
            if full or one.always
            for suffix in ("", STEP)
            for dtype in dtypes
            for size in sizes
            for shape in _shapes(name, *size)
        ]

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

        def draw() -> Tensors:
            makers = {
                "input": lambda: normal(rows, width),
                "weight": lambda: (
                    width**-0.5 * normal(*outer, width) if outer else 1 + normal(width) / 10
                ),
                "bias": lambda: normal(*widths[-1:]),
            }
            return tuple(makers[name]() for name in inspect.signature(op).parameters)

        op, (rows, *widths) = _layer(case).op, case.shape
        width, *outer = widths
        primals, tangents, grad = draw(), draw(), normal(rows, widths[-1])
        return Operands(op, primals, tangents, (grad, grad))

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """By PyTorch's rules in float64: its ordinary passes, and torch.func.jvp."""
        exact = inputs.map(torch.Tensor.double)
        _, output_t = ops.torch_jvp(exact.op, exact.primals, exact.tangents)
        return *call_of(Provider("plain", plain, question="primal"), _kind(case), exact)(), output_t

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        return call_of(provider, _kind(case), inputs)

    def providers(self, case: Case) -> list[Provider]:
        """Those that answer the case: finite differences have no gradients."""
        found, step = super().providers(case), _kind(case) == "step"
        return [one for one in found if not (step and one.question == "finite-differences")]

    def bound(self, case: Case) -> float:
        """Some roundings of the dtype; eager PyTorch errs up to 1e-6, 1e-3 and 7e-3."""
        return {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        name, sizes = case.op.removesuffix(STEP), (*case.shape, case.torch_dtype.itemsize)
        count: Any = linear_cost if name == "linear" else partial(row_cost, name)
        return count(_kind(case), provider.question, *sizes)


def _shapes(name: str, rows: int, width: int, mlp: int) -> list[tuple[int, ...]]:
    if name == "linear":
        return [(rows, width, mlp), (rows, mlp, width)]
    return [(rows, mlp if LAYERS[name].wide else width)]


def _layer(case: Case) -> Layer:
    return LAYERS[case.op.removesuffix(STEP)]


def _kind(case: Case) -> str:
    return "step" if case.op.endswith(STEP) else "forward"


SUITE = LayerSuite()


@SUITE.provider("ours")
def ours(op: Op, primals: Tensors, tangents: Tensors) -> Pair:
    """In a dual level with the heavy ops fused, as ``LinearizedModel`` runs its anchor."""
    with fused_forward_ad():
        return in_dual_level(op, primals, tangents)


@SUITE.provider("plain", question="primal")
def plain(op: Op, primals: Tensors, _: None) -> Tensor:
    return op(*primals)


SUITE.provider("torch-jvp")(ops.torch_jvp)
SUITE.provider("compiled", missing=compiling_is_slow)(ops.compiled)
SUITE.provider("finite-differences", question="finite-differences")(ops.finite_differences)


def test_elementwise(provider, benchmark) -> None:
    provider.time(benchmark)


def test_linear(provider, benchmark) -> None:
    provider.time(benchmark)
