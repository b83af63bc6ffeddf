"""Single layers, alone and with the tangent's gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.suite.case import Call, Case, Cost, Extent, Outputs, Provider
from benchmarks.suite.derivatives import (
    compiling_is_too_slow,
    finite_difference_slack,
    finite_difference_step,
    push_forward,
)
from benchmarks.suite.layer_ops import LAYERS, Pair, Tensors

Op = Callable[[str, Tensors, Tensors], Pair]

ELEMENTWISE, LINEAR = "elementwise", "linear"
NORMS, MAPS = ("rms_norm", "softmax"), ("silu",)  # of extent "full"
STEP = "-step"  # ends the name of an op whose tangents' gradients are asked for

# Rows (images times tokens), width and MLP width of a ViT at 224 pixels in patches of 16.
VIT_SMALL, VIT_LARGE_ON_CPU = (8 * 197, 384, 1536), (8 * 197, 1024, 4096)
VIT_BASE, VIT_LARGE = (64 * 197, 768, 3072), (64 * 197, 1024, 4096)


@dataclass(frozen=True)
class Operands:
    """Operands of one call.

    Attributes:
        primals: inputs and parameters: of most (rows, width) and (width,); of linear
            (rows, inner), (outer, inner), (outer,).
        tangents: theirs.
        grad: cotangent of the output's tangent, shaped as the output.
    """

    primals: Tensors
    tangents: Tensors
    grad: Tensor


class LayerWorkload:
    """Shapes are (rows, width), of linear (rows, inner, outer).

    Results are the output and its tangent. Of a step: the output, the gradients of the tangents of
    input and parameters, and the output's tangent. Those gradients are the ordinary ones of input
    and parameters under the same cotangent, so the yardstick's are checked, too.
    """

    groups = (ELEMENTWISE, LINEAR)

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        cpu, full = device.type == "cpu", extent == "full"
        sizes, dtypes = [VIT_SMALL if cpu else VIT_BASE], ["fp32" if cpu else "bf16"]
        if full:
            sizes.append(VIT_LARGE_ON_CPU if cpu else VIT_LARGE)
            dtypes += ["bf16"] if cpu else ["fp16", "fp32"]
        questions = [
            (ELEMENTWISE, "layer_norm", lambda rows, width, mlp: (rows, width)),
            (ELEMENTWISE, "gelu", lambda rows, width, mlp: (rows, mlp)),
            *((ELEMENTWISE, op, lambda rows, width, mlp: (rows, width)) for op in NORMS if full),
            *((ELEMENTWISE, op, lambda rows, width, mlp: (rows, mlp)) for op in MAPS if full),
            (LINEAR, "linear", lambda rows, width, mlp: (rows, width, mlp)),
            (LINEAR, "linear", lambda rows, width, mlp: (rows, mlp, width)),
        ]
        return [
            Case(group, op + suffix, shape(*size), dtype)
            for group, op, shape in questions
            for suffix in ("", STEP)
            for dtype in dtypes
            for size in sizes
        ]

    def providers(self, case: Case) -> Sequence[Provider]:
        """This library, PyTorch's own rules, the compiler, and the plain layer as the yardstick."""
        found = [
            _provider("ours", case, ours),
            _provider("torch-jvp", case, torch_jvp),
            _provider("compiled", case, compiled, why_not=compiling_is_too_slow),
        ]
        if not _is_step(case):
            slack = finite_difference_slack(self.bound(case))
            found.append(_provider("finite-differences", case, finite_differences, slack=slack))
        return [*found, Provider("plain", _prepare_plain, functools.partial(_cost, "primal"))]

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

        def draw() -> Tensors:
            return LAYERS[_layer(case)].draw(normal, *case.shape)

        rows, width, *outer = case.shape
        return Operands(draw(), draw(), normal(rows, *(outer or [width])))

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """By PyTorch's rules in float64: jvp, and its ordinary backward pass."""
        primals, tangents = (
            tuple(x.double() for x in y) for y in (inputs.primals, inputs.tangents)
        )
        output, output_t = torch_jvp(_layer(case), primals, tangents)
        if not _is_step(case):
            return output, output_t
        return *_plain_step(_layer(case), primals, inputs.grad.double()), output_t

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """All of it."""
        return outputs

    def bound(self, case: Case) -> float:
        """Some roundings of the dtype; eager PyTorch errs up to 1e-6, 1e-3 and 7e-3."""
        return {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}[case.dtype]


# --- the ops: output and tangent -----------------------------------------------------------------


def plain(layer: str, *primals: Tensor) -> Tensor:
    return LAYERS[layer].plain(*primals)


def ours(layer: str, primals: Tensors, tangents: Tensors) -> Pair:
    return push_forward(LAYERS[layer].plain, primals, tangents)


def torch_jvp(layer: str, primals: Tensors, tangents: Tensors) -> Pair:
    output, output_t, *_ = torch.func.jvp(LAYERS[layer].plain, primals, tangents)
    return output, output_t


@functools.cache
def _compiled_formula(layer: str) -> Callable[[Tensors, Tensors], Pair]:
    return torch.compile(LAYERS[layer].formula, dynamic=False)


def compiled(layer: str, primals: Tensors, tangents: Tensors) -> Pair:
    return _compiled_formula(layer)(primals, tangents)


def finite_differences(layer: str, primals: Tensors, tangents: Tensors) -> Pair:
    """Two plain calls: a tangent with half the digits, at best."""
    step = finite_difference_step(primals[0].dtype)
    output = plain(layer, *primals)
    moved = plain(layer, *(p + step * t for p, t in zip(primals, tangents, strict=True)))
    return output, (moved - output) / step


# --- from an op to the call that is timed --------------------------------------------------------


def _provider(name: str, case: Case, op: Op, **more) -> Provider:
    def prepare(case: Case, inputs: Operands) -> Call:
        layer, primals = _layer(case), inputs.primals
        if not _is_step(case):
            return torch.no_grad()(lambda: op(layer, primals, inputs.tangents))
        leaves = _leaves(inputs.tangents)

        def step() -> Outputs:
            output, output_t = op(layer, primals, leaves)
            return output, *torch.autograd.grad(output_t, leaves, inputs.grad), output_t

        return step

    question = name if name == "finite-differences" else "dual"
    return Provider(name, prepare, functools.partial(_cost, question), **more)


def _prepare_plain(case: Case, inputs: Operands) -> Call:
    layer = _layer(case)
    if not _is_step(case):
        return torch.no_grad()(lambda: (plain(layer, *inputs.primals),))
    return lambda: _plain_step(layer, inputs.primals, inputs.grad)


def _plain_step(layer: str, primals: Tensors, grad: Tensor) -> Outputs:
    """The ordinary forward and backward pass: output, gradients of the primals."""
    leaves = _leaves(primals)
    output = plain(layer, *leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def _cost(question: str, case: Case) -> Cost:
    """Of "primal", "dual" or "finite-differences"; or of the step that a case asks for."""
    if _is_step(case):
        question = {"primal": "ordinary-step", "dual": "tangent-step"}[question]
    return LAYERS[_layer(case)].cost(question, *case.shape, case.torch_dtype.itemsize)


def _layer(case: Case) -> str:
    return case.op.removesuffix(STEP)


def _is_step(case: Case) -> bool:
    return case.op.endswith(STEP)


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)
