"""Single layers: output and tangent, alone or with the tangent's gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.case import (
    Call,
    Case,
    Cost,
    Extent,
    Outputs,
    Provider,
    Suite,
    compiling_is_slow,
    finite_difference_step,
    leaves,
)
from benchmarks.roofline import linear_cost, row_cost
from tangent_ops import fused_forward_ad

Tensors = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]  # output and tangent
Normal = Callable[..., Tensor]  # standard normal numbers of a shape
Draw = Callable[..., Tensors]

STEP = "-step"  # ends the name of an op whose tangents' gradients are computed, too
EPS = 1e-5
# Rows (images times tokens), width and MLP width of a ViT at 224 pixels in patches of 16.
VIT_SMALL, VIT_LARGE_ON_CPU = (8 * 197, 384, 1536), (8 * 197, 1024, 4096)
VIT_BASE, VIT_LARGE = (64 * 197, 768, 3072), (64 * 197, 1024, 4096)


# --- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer by PyTorch's functions.

    Attributes:
        plain: takes inputs (rows, width) and parameters, gives one output.
        draw: random operands of (rows, width), of linear (rows, inner, outer).
        wide: whether the width is the MLP's.
        always: whether it is measured by default, not in extent "full" alone.
    """

    plain: Callable[..., Tensor]
    draw: Draw
    wide: bool
    always: bool


LAYERS: dict[str, Layer] = {}


def layer(draw: Draw, wide: bool = False, always: bool = False) -> Callable[[Callable], Callable]:
    """Registers the decorated function as a layer of that name."""

    def register(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LAYERS[plain.__name__] = Layer(plain, draw, wide, always)
        return plain

    return register


def input_only(normal: Normal, rows: int, width: int) -> Tensors:
    return (normal(rows, width),)


def with_weight(normal: Normal, rows: int, width: int) -> Tensors:
    return normal(rows, width), 1 + 0.1 * normal(width)


def with_weight_and_bias(normal: Normal, rows: int, width: int) -> Tensors:
    return *with_weight(normal, rows, width), normal(width)


def of_linear(normal: Normal, rows: int, inner: int, outer: int) -> Tensors:
    return normal(rows, inner), inner**-0.5 * normal(outer, inner), normal(outer)


@layer(with_weight_and_bias, always=True)
def layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias, EPS)


@layer(input_only, wide=True, always=True)
def gelu(input: Tensor) -> Tensor:
    return F.gelu(input)


@layer(with_weight)
def rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(input, weight.shape, weight, EPS)


@layer(input_only)
def softmax(input: Tensor) -> Tensor:
    return F.softmax(input, -1)


@layer(input_only, wide=True)
def silu(input: Tensor) -> Tensor:
    return F.silu(input)


@layer(of_linear, always=True)
def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(input, weight, bias)


# --- the suite -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """Operands of one call.

    Attributes:
        primals: inputs and parameters: of most (rows, width) and (width,); of linear
            (rows, inner), (outer, inner), (outer,).
        tangents: their tangents.
        grad: cotangent of the output's tangent, shaped as the output.
    """

    primals: Tensors
    tangents: Tensors
    grad: Tensor


class LayerSuite(Suite):
    """Shapes are (rows, width), of linear (rows, inner, outer).

    A provider's function takes the layer's plain function, primals and tangents (None if its
    question is "primal"); it gives output and tangent, or the output alone. Results are these. Of a
    step: the output, the gradients of the tangents of input and parameters, and the output's
    tangent. Those gradients are the ordinary ones under the same cotangent, so that the plain
    layer's are checked, too.
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

        rows, width, *outer = case.shape
        draw = _layer(case).draw
        return Operands(
            draw(normal, *case.shape),
            draw(normal, *case.shape),
            normal(rows, *(outer or [width])),
        )

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """By PyTorch's rules in float64: jvp, and its ordinary backward pass."""
        primals = tuple(x.double() for x in inputs.primals)
        tangents = tuple(x.double() for x in inputs.tangents)
        run = _layer(case).plain
        output, output_t = torch_jvp(run, primals, tangents)
        if not _is_step(case):
            return output, output_t
        return *_plain_step(run, primals, inputs.grad.double()), output_t

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        run, primals = _layer(case).plain, inputs.primals
        if provider.question == "primal":
            if _is_step(case):
                return lambda: _plain_step(run, primals, inputs.grad)
            return torch.no_grad()(lambda: (provider.answer(run, primals, None),))
        if not _is_step(case):
            return torch.no_grad()(lambda: provider.answer(run, primals, inputs.tangents))
        tangents = leaves(inputs.tangents)

        def step() -> Outputs:
            output, output_t = provider.answer(run, primals, tangents)
            return output, *torch.autograd.grad(output_t, tangents, inputs.grad), output_t

        return step

    def providers(self, case: Case) -> list[Provider]:
        """Those that answer the case: finite differences have no gradients."""
        return [one for one in super().providers(case) if not (one.approximate and _is_step(case))]

    def bound(self, case: Case) -> float:
        """Some roundings of the dtype; eager PyTorch errs up to 1e-6, 1e-3 and 7e-3."""
        return {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        forward = {"tangent": "dual"}.get(provider.question, provider.question)
        step = {"tangent": "tangent-step", "primal": "ordinary-step"}
        question = step[provider.question] if _is_step(case) else forward
        name, sizes = case.op.removesuffix(STEP), (*case.shape, case.torch_dtype.itemsize)
        count: Any = linear_cost if name == "linear" else functools.partial(row_cost, name)
        return count(question, *sizes)


def _shapes(name: str, rows: int, width: int, mlp: int) -> list[tuple[int, ...]]:
    if name == "linear":
        return [(rows, width, mlp), (rows, mlp, width)]
    return [(rows, mlp if LAYERS[name].wide else width)]


def _layer(case: Case) -> Layer:
    return LAYERS[case.op.removesuffix(STEP)]


def _is_step(case: Case) -> bool:
    return case.op.endswith(STEP)


def _plain_step(run: Callable[..., Tensor], primals: Tensors, grad: Tensor) -> Outputs:
    """The ordinary forward and backward pass: output, gradients of the primals."""
    found = leaves(primals)
    output = run(*found)
    return output.detach(), *torch.autograd.grad(output, found, grad)


# --- providers -----------------------------------------------------------------------------------

SUITE = LayerSuite()


@SUITE.provider("ours")
def ours(run: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Pair:
    """In a plain dual level with the heavy ops fused, as ``LinearizedModel`` runs its anchor."""
    with fused_forward_ad(), forward_ad.dual_level():
        output = run(*map(forward_ad.make_dual, primals, tangents))
        primal, tangent = forward_ad.unpack_dual(output)
    assert tangent is not None
    return primal, tangent


@SUITE.provider("torch-jvp")
def torch_jvp(run: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Pair:
    output, output_t, *_ = torch.func.jvp(run, primals, tangents)
    return output, output_t


@SUITE.provider("compiled", missing=compiling_is_slow)
def compiled(run: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Pair:
    return _compiled_jvp(run)(primals, tangents)


@functools.cache
def _compiled_jvp(run: Callable[..., Tensor]) -> Any:
    return torch.compile(lambda primals, tangents: torch_jvp(run, primals, tangents), dynamic=False)


@SUITE.provider("finite-differences", question="finite-differences", approximate=True)
def finite_differences(run: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Pair:
    """Two plain calls."""
    step = finite_difference_step(primals[0].dtype)
    output = run(*primals)
    moved = run(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    return output, (moved - output) / step


@SUITE.provider("plain", question="primal")
def plain(run: Callable[..., Tensor], primals: Tensors, _: None) -> Tensor:
    return run(*primals)


# --- benchmarks ----------------------------------------------------------------------------------


def test_elementwise(provider, benchmark) -> None:
    provider.time(benchmark)


def test_linear(provider, benchmark) -> None:
    provider.time(benchmark)
