"""Attention: forward with tangent, backward of the tangent, and backward of both."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ops
from benchmarks.case import (
    Call,
    Case,
    Cost,
    Extent,
    Outputs,
    Provider,
    Suite,
    compiling_is_slow,
    needs_cuda,
)
from benchmarks.ops import Operands, Pair, Tensors, call_of, in_dual_level
from benchmarks.roofline import attention_cost
from tangent_ops import scaled_dot_product_attention

FORWARD, BACKWARD, SECOND = "attention-forward", "attention-backward", "attention-second-order"
# What a call of the group gives, for ops.call_of.
KINDS = {FORWARD: "forward", BACKWARD: "backward", SECOND: "second-order"}

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
# Those that the targets speak of, with few heads where they are long.
HOME = [
    *((64, 12, tokens, 64) for tokens in (197, 577)),
    (8, 12, 1024, 64),
    (4, 8, 4096, 64),
    (64, 6, 197, 128),
    (4, 8, 4096, 128),
]
ON_CPU = [(8, 12, 50, 64), (8, 12, 197, 64), (2, 12, 577, 64)]
CAUSAL_ON_CPU = [(1, 12, 1024, 64)]


@dataclass(frozen=True)
class Attention:
    """PyTorch's attention: query, key, value (B, H, N, D) -> output (B, H, N, D)."""

    causal: bool  # whether later keys are masked

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


class AttentionSuite(Suite):
    """Shapes are (B, H, N, D).

    A provider's function takes an :class:`Attention`, primals (query, key, value) and tangents, and
    gives output and tangent; one whose question is "primal" takes no tangents (None) and gives the
    output. Results: output and tangent; gradients of the three tangents, given the cotangent of the
    output's tangent; gradients of tangents, then primals, given both cotangents.
    """

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        full = extent == "full"
        if device.type == "cpu":
            dtypes = ("fp32", "bf16") if full else ("fp32",)
            shapes, causal = ON_CPU, CAUSAL_ON_CPU
        elif extent == "home":
            dtypes, shapes, causal = ("bf16",), HOME, ()
        else:
            dtypes = ("bf16", "fp16", "fp32") if full else ("bf16",)
            shapes = [*VIT, *(LONG if full else SOME_LONG)]
            causal = LONG if full else SOME_CAUSAL
        return [
            Case(group, "attention", shape, dtype, is_causal)
            for group in KINDS
            for dtype in dtypes
            for is_causal, some in ((False, shapes), (True, causal))
            for shape in some
        ]

    def inputs(self, case: Case, device: torch.device, seed: int) -> Operands:
        """As timm's packed qkv gives them."""
        batch, heads, tokens, depth = case.shape
        generator = torch.Generator(device).manual_seed(seed)

        def packed() -> Tensors:
            shape = (batch, tokens, 3, heads, depth)
            qkv = torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)
            return rearrange(qkv, "b n qkv h d -> qkv b h n d").unbind()

        primals, tangents, (grad, grad_t, _) = packed(), packed(), packed()
        return Operands(Attention(case.causal), primals, tangents, (grad, grad_t))

    def expected(self, case: Case, inputs: Operands) -> Outputs:
        """By PyTorch's MATH formula in float64, for the corners of batch and heads alone.

        One head at a time: N x N in float64 is 2 GB at 16,384 tokens, and there are several. The
        gradients of the tangents are those of plain attention's backward pass.
        """
        math = Provider("math", partial(sdpa, SDPBackend.MATH), question="primal")
        exact = math if case.group == BACKWARD else Provider("jvp", ops.torch_jvp)

        def answer(batch: int, head: int) -> Outputs:
            at = slice(batch, batch + 1), slice(head, head + 1)
            some = inputs.map(lambda x: _corners(x)[at].double())
            return call_of(exact, KINDS[case.group], some)()

        batch, heads, *_ = _corners(inputs.primals[0]).shape
        answers = [answer(b, h) for b in range(batch) for h in range(heads)]
        joined = map(torch.cat, zip(*answers, strict=True))
        return tuple(x.view(batch, heads, *x.shape[2:]) for x in joined)

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        return tuple(_corners(x) for x in outputs)

    def prepare(self, provider: Provider, case: Case, inputs: Operands) -> Call:
        return call_of(provider, KINDS[case.group], inputs)

    def bound(self, case: Case) -> float:
        """A few roundings of the dtype; eager PyTorch errs 5e-7, 1e-3 and 8e-3."""
        return {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}[case.dtype]

    def cost(self, case: Case, provider: Provider) -> Cost:
        size = case.torch_dtype.itemsize
        return attention_cost(KINDS[case.group], provider.question, case.shape, size, case.causal)


def _corners(x: Tensor) -> Tensor:
    """The first and the last of batch and heads: wrong offsets show at the far end."""
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]


SUITE = AttentionSuite()


@SUITE.provider("ours")
def ours(attention: Attention, primals: Tensors, tangents: Tensors) -> Pair:
    op = partial(scaled_dot_product_attention, is_causal=attention.causal)
    return in_dual_level(op, primals, tangents)


def _flash_jvp_is_missing(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("jvp_flash_attention") is None:
        return "not installed: pip install jvp-flash-attention"
    return needs_cuda(case, device)


@SUITE.provider("jvp-flash-attention", missing=_flash_jvp_is_missing)
def flash_jvp(attention: Attention, primals: Tensors, tangents: Tensors) -> Pair:
    op = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual
    return in_dual_level(partial(op, causal=attention.causal), primals, tangents)


def sdpa(backend: SDPBackend, attention: Attention, primals: Tensors, _: None) -> Tensor:
    """PyTorch's attention without a tangent, by one of its kernels."""
    with sdpa_kernel(backend):
        return attention(*primals)


CUDA_ONLY: Any = {"missing": needs_cuda, "question": "primal"}
SUITE.provider("sdpa-flash", question="primal")(partial(sdpa, SDPBackend.FLASH_ATTENTION))
SUITE.provider("sdpa-efficient", **CUDA_ONLY)(partial(sdpa, SDPBackend.EFFICIENT_ATTENTION))
SUITE.provider("sdpa-cudnn", **CUDA_ONLY)(partial(sdpa, SDPBackend.CUDNN_ATTENTION))
SUITE.provider("sdpa-math", question="primal")(partial(sdpa, SDPBackend.MATH))


@dataclass(frozen=True)
class Formula(Attention):
    """The formula written out: products in the operands' dtype, softmax in float32."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1).to(value.dtype) @ value


@SUITE.provider("compiled", missing=compiling_is_slow)
def compiled(attention: Attention, primals: Tensors, tangents: Tensors) -> Pair:
    return ops.compiled(Formula(attention.causal), primals, tangents)


SUITE.provider("torch-jvp")(ops.torch_jvp)
SUITE.provider("finite-differences", groups=(FORWARD,), question="finite-differences")(
    ops.finite_differences
)


def test_attention_forward(provider, benchmark) -> None:
    provider.time(benchmark)


def test_attention_backward(provider, benchmark) -> None:
    provider.time(benchmark)


def test_attention_second_order(provider, benchmark) -> None:
    provider.time(benchmark)
