"""Attention: forward with tangent, backward of the tangent, and backward of both."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from benchmarks.roofline import attention_cost
from tangent_ops import scaled_dot_product_attention

Triple = tuple[Tensor, Tensor, Tensor]  # query, key, value
Pair = tuple[Tensor, Tensor]  # output and tangent

FORWARD, BACKWARD, SECOND = "attention-forward", "attention-backward", "attention-second-order"
# roofline's name of what a group computes, with a tangent and without.
DUAL = {FORWARD: "dual", BACKWARD: "tangent-backward", SECOND: "dual-backward"}
PRIMAL = {FORWARD: "primal", BACKWARD: "primal-backward", SECOND: "primal-backward"}

# Batch, heads, tokens, head dimension. 50, 197, 257, 577: ViTs at 98 to 384 pixels.
VIT = [(64, heads, tokens, 64) for heads in (12, 16) for tokens in (50, 197, 257, 577)]
LONG = [
    (batch, 12, tokens, depth)
    for depth in (64, 72, 128)
    for batch, tokens in ((16, 1024), (4, 4096), (2, 8192), (1, 16384))
]
# These fit into ten minutes with the rest of the suite.
SOME_LONG = [*LONG[:4], (4, 12, 4096, 72), (4, 12, 4096, 128)]
SOME_CAUSAL = [(4, 12, 4096, 64)]
ON_CPU = [(8, 12, 50, 64), (8, 12, 197, 64), (2, 12, 577, 64)]
CAUSAL_ON_CPU = [(1, 12, 1024, 64)]


@dataclass(frozen=True)
class Operands:
    """Operands of one call, all (B, H, N, D), as timm's packed qkv gives them.

    Attributes:
        primals: query, key, value.
        tangents: their tangents.
        grads: cotangents of the output and of its tangent.
        causal: whether later keys are masked.
    """

    primals: Triple
    tangents: Triple
    grads: Pair
    causal: bool


class AttentionSuite(Suite):
    """Shapes are (B, H, N, D).

    A provider's function takes primals, tangents (None if its question is "primal") and causal; it
    gives output and tangent, or the output alone. Results: output and tangent; gradients of the
    three tangents, given the cotangent of the output's tangent (which are those of plain attention,
    given the same cotangent); gradients of tangents, then primals, given both cotangents.
    """

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        full = extent == "full"
        if device.type == "cpu":
            dtypes = ("fp32", "bf16") if full else ("fp32",)
            shapes, causal = ON_CPU, CAUSAL_ON_CPU
        else:
            dtypes = ("bf16", "fp16", "fp32") if full else ("bf16",)
            shapes = [*VIT, *(LONG if full else SOME_LONG)]
            causal = LONG if full else SOME_CAUSAL
        return [
            Case(group, "attention", shape, dtype, is_causal)
            for group in DUAL
            for dtype in dtypes
            for is_causal, some in ((False, shapes), (True, causal))
            for shape in some
        ]

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        batch, heads, tokens, depth = case.shape
        generator = torch.Generator(device).manual_seed(seed)

        def packed() -> Triple:
            shape = (batch, tokens, 3, heads, depth)
            qkv = torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)
            query, key, value = rearrange(qkv, "b n qkv h d -> qkv b h n d").unbind()
            return query, key, value

        return Operands(packed(), packed(), packed()[:2], case.causal)

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """By PyTorch's MATH formula in float64, for the corners of batch and heads alone.

        One head at a time: N x N in float64 is 2 GB at 16,384 tokens, and there are several. The
        gradients of the tangents are taken from plain attention's backward pass.
        """
        call = _plain_call if case.group == BACKWARD else _call
        answer = sdpa_math if case.group == BACKWARD else torch_jvp

        def cut(tensors: tuple[Tensor, ...], *at: int) -> Any:
            where = tuple(slice(i, i + 1) for i in at)
            return tuple(_corners(x)[where].double() for x in tensors)

        batch, heads, *_ = _corners(inputs.primals[0]).shape
        rows = []
        for b in range(batch):
            found = []
            for h in range(heads):
                primals, tangents = cut(inputs.primals, b, h), cut(inputs.tangents, b, h)
                one = Operands(primals, tangents, cut(inputs.grads, b, h), inputs.causal)
                found.append(call(answer, case.group, one)())
            rows.append(_joined(found, dim=1))
        return _joined(rows, dim=0)

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        return tuple(_corners(x) for x in outputs)

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        if provider.question == "primal":
            return _plain_call(provider.answer, case.group, inputs)
        return _call(provider.answer, case.group, inputs)

    def bound(self, case: Case) -> float:
        """A few roundings of the dtype; eager PyTorch errs 5e-7, 1e-3 and 8e-3."""
        return {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        question = {"tangent": DUAL[case.group], "primal": PRIMAL[case.group]}.get(
            provider.question, provider.question
        )
        return attention_cost(question, case.shape, case.torch_dtype.itemsize, case.causal)


def _call(answer: Callable[..., Pair], group: str, inputs: Operands) -> Call:
    """The forward pass; or the backward pass alone, after a forward pass whose graph is kept."""
    if group == FORWARD:
        return torch.no_grad()(lambda: answer(inputs.primals, inputs.tangents, inputs.causal))
    tangents = leaves(inputs.tangents)
    if group == BACKWARD:
        _, output_t = answer(inputs.primals, tangents, inputs.causal)
        return lambda: torch.autograd.grad(output_t, tangents, inputs.grads[1], retain_graph=True)
    primals = leaves(inputs.primals)
    outputs = answer(primals, tangents, inputs.causal)
    return lambda: torch.autograd.grad(
        outputs, (*tangents, *primals), inputs.grads, retain_graph=True
    )


def _plain_call(answer: Callable[..., Tensor], group: str, inputs: Operands) -> Call:
    if group == FORWARD:
        return torch.no_grad()(lambda: (answer(inputs.primals, None, inputs.causal),))
    primals = leaves(inputs.primals)
    output = answer(primals, None, inputs.causal)
    return lambda: torch.autograd.grad(output, primals, inputs.grads[1], retain_graph=True)


def _corners(x: Tensor) -> Tensor:
    """The first and the last of batch and heads: wrong offsets show at the far end."""
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]


def _joined(parts: Sequence[Outputs], dim: int) -> Outputs:
    return tuple(torch.cat(some, dim) for some in zip(*parts, strict=True))


# --- providers -----------------------------------------------------------------------------------

SUITE = AttentionSuite()


@SUITE.provider("ours")
def ours(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    return _in_dual_level(scaled_dot_product_attention, primals, tangents, is_causal=causal)


@SUITE.provider(
    "finite-differences", groups=(FORWARD,), question="finite-differences", approximate=True
)
def finite_differences(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    """Two ordinary forward passes."""
    step = finite_difference_step(primals[0].dtype)
    query, key, value = (p + step * t for p, t in zip(primals, tangents, strict=True))
    output = plain(primals, causal)
    return output, (plain((query, key, value), causal) - output) / step


def plain(qkv: Triple, causal: bool, backend: SDPBackend | None = None) -> Tensor:
    query, key, value = qkv
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _needs_cuda(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it runs on CUDA only"


@SUITE.provider("sdpa-flash", question="primal")
def sdpa_flash(primals: Triple, _: None, causal: bool) -> Tensor:
    return plain(primals, causal, SDPBackend.FLASH_ATTENTION)


@SUITE.provider("sdpa-efficient", question="primal", missing=_needs_cuda)
def sdpa_efficient(primals: Triple, _: None, causal: bool) -> Tensor:
    return plain(primals, causal, SDPBackend.EFFICIENT_ATTENTION)


@SUITE.provider("sdpa-cudnn", question="primal", missing=_needs_cuda)
def sdpa_cudnn(primals: Triple, _: None, causal: bool) -> Tensor:
    return plain(primals, causal, SDPBackend.CUDNN_ATTENTION)


@SUITE.provider("sdpa-math", question="primal")
def sdpa_math(primals: Triple, _: None, causal: bool) -> Tensor:
    return plain(primals, causal, SDPBackend.MATH)


def _flash_jvp_is_missing(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("jvp_flash_attention") is None:
        return "not installed: pip install jvp-flash-attention"
    return _needs_cuda(case, device)


@SUITE.provider("jvp-flash-attention", missing=_flash_jvp_is_missing)
def flash_jvp(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    op = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual
    return _in_dual_level(op, primals, tangents, causal=causal)


def _in_dual_level(
    op: Callable[..., Tensor], primals: Triple, tangents: Triple, **options: Any
) -> Pair:
    with forward_ad.dual_level():
        output = op(*map(forward_ad.make_dual, primals, tangents), **options)
        primal, tangent = forward_ad.unpack_dual(output)
    assert tangent is not None
    return primal, tangent


@SUITE.provider("compiled", missing=compiling_is_slow)
def compiled(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    return _compiled_formula()(primals, tangents, causal)


@functools.cache
def _compiled_formula() -> Callable[[Triple, Triple, bool], Pair]:
    functorch_config.donated_buffer = False  # the backward runs many times
    return torch.compile(formula, dynamic=False)


def formula(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    """The formula as one writes it by hand: products in the operands' dtype, softmax in float32."""
    (query, key, value), (query_t, key_t, value_t) = primals, tangents
    scale = query.shape[-1] ** -0.5
    scores = (query @ key.mT).float() * scale
    scores_t = (query_t @ key.mT + query @ key_t.mT).float() * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(-1)
    moved = weights * scores_t
    moved = moved - weights * moved.sum(-1, keepdim=True)
    weights, moved = weights.to(value.dtype), moved.to(value.dtype)
    return weights @ value, moved @ value + weights @ value_t


@SUITE.provider("torch-jvp")
def torch_jvp(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    """torch.func.jvp; MATH is PyTorch's only attention with a forward derivative."""

    def math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plain((query, key, value), causal, SDPBackend.MATH)

    primal, tangent, *_ = torch.func.jvp(math, primals, tangents)
    return primal, tangent


# --- benchmarks ----------------------------------------------------------------------------------


def test_attention_forward(provider, benchmark) -> None:
    provider.time(benchmark)


def test_attention_backward(provider, benchmark) -> None:
    provider.time(benchmark)


def test_attention_second_order(provider, benchmark) -> None:
    provider.time(benchmark)
