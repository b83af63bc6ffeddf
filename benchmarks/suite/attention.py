"""Attention: forward with tangent, the tangent's backward, and the backward of both."""

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

from benchmarks.roofline import attention_cost
from benchmarks.suite.case import Call, Case, Extent, Outputs, Provider
from benchmarks.suite.derivatives import (
    compiling_is_too_slow,
    finite_difference_slack,
    finite_difference_step,
)
from tangent_ops import scaled_dot_product_attention

Triple = tuple[Tensor, Tensor, Tensor]  # query, key, value
Pair = tuple[Tensor, Tensor]  # output and tangent
Op = Callable[[Triple, Triple, bool], Pair]

FORWARD, BACKWARD, SECOND = "attention-forward", "attention-backward", "attention-second-order"
# What a group asks, and what plain attention answers beside it: names of roofline's questions.
DUAL = {FORWARD: "dual", BACKWARD: "tangent-backward", SECOND: "dual-backward"}
PRIMAL = {FORWARD: "primal", BACKWARD: "primal-backward", SECOND: "primal-backward"}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}

# Batch, heads, tokens, head dimension. 50, 197, 257, 577: ViTs at 98 to 384 pixels.
VIT = [(64, heads, tokens, 64) for heads in (12, 16) for tokens in (50, 197, 257, 577)]
LONG = [
    (batch, 12, tokens, depth)
    for depth in (64, 72, 128)
    for batch, tokens in ((16, 1024), (4, 4096), (1, 16384))
]
# What fits into ten minutes with the rest of the suite.
SOME_LONG = [LONG[0], LONG[1], LONG[2], (4, 12, 4096, 72), (4, 12, 4096, 128)]
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


class AttentionWorkload:
    """Shapes are (B, H, N, D). Results are in the order of `expected`."""

    groups = (FORWARD, BACKWARD, SECOND)

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
            for group in self.groups
            for dtype in dtypes
            for is_causal, some in ((False, shapes), (True, causal))
            for shape in some
        ]

    def providers(self, case: Case) -> Sequence[Provider]:
        """The fused op; plain attention by every backend, the yardstick; rivals, hungriest last."""
        found = [_provider("ours", case, ours)]
        if case.group == FORWARD:
            slack = finite_difference_slack(self.bound(case))
            found.append(_provider("finite-differences", case, finite_differences, slack=slack))
        return [
            *found,
            *(_yardstick(name, case.group) for name in SDPA),
            _provider("jvp-flash-attention", case, flash_jvp, why_not=_flash_jvp_is_missing),
            _provider("compiled", case, compiled, why_not=compiling_is_too_slow),
            _provider("torch-jvp", case, torch_jvp),
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

        Forward: output and tangent. Backward: gradients of the three tangents, given the cotangent
        of the output's tangent; since it is linear in them, PyTorch's plain backward. Second
        order: gradients of tangents, then primals, given the cotangents of both outputs.
        """
        batch, heads = (_corners(inputs.primals[0]).shape[i] for i in (0, 1))
        # One head at a time: N x N in float64 is 2 GB at 16,384 tokens, and there are several.
        rows = [
            _joined([_exact(case.group, _one_head(inputs, b, h)) for h in range(heads)], dim=1)
            for b in range(batch)
        ]
        return _joined(rows, dim=0)

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """The part of a provider's results that `expected` computes."""
        return tuple(_corners(x) for x in outputs)

    def bound(self, case: Case) -> float:
        """A few roundings of the dtype; eager PyTorch errs 5e-7, 1e-3 and 8e-3."""
        return {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}[case.dtype]


def _exact(group: str, wide: Operands) -> Outputs:
    if group == FORWARD:
        return torch_jvp(wide.primals, wide.tangents, wide.causal)
    if group == BACKWARD:
        leaves = _leaves(wide.primals)
        output = plain(leaves, wide.causal, SDPBackend.MATH)
        return torch.autograd.grad(output, leaves, wide.grads[1])
    return _backward(torch_jvp, wide, SECOND)()


def _one_head(inputs: Operands, sample: int, head: int) -> Operands:
    """One of the corners, in float64."""

    def cut(tensors: tuple[Tensor, ...]) -> Any:
        at = (slice(sample, sample + 1), slice(head, head + 1))
        return tuple(_corners(x)[at].double() for x in tensors)

    return Operands(cut(inputs.primals), cut(inputs.tangents), cut(inputs.grads), inputs.causal)


def _joined(parts: Sequence[Outputs], dim: int) -> Outputs:
    return tuple(torch.cat(some, dim) for some in zip(*parts, strict=True))


# --- the ops: output and tangent -----------------------------------------------------------------


def ours(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    with forward_ad.dual_level():
        query, key, value = map(forward_ad.make_dual, primals, tangents)
        output = scaled_dot_product_attention(query, key, value, is_causal=causal)
        primal, tangent = forward_ad.unpack_dual(output)
    assert tangent is not None
    return primal, tangent


def plain(qkv: Triple, causal: bool, backend: SDPBackend | None = None) -> Tensor:
    query, key, value = qkv
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def torch_jvp(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    def math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plain((query, key, value), causal, SDPBackend.MATH)

    primal, tangent, *_ = torch.func.jvp(math, primals, tangents)
    return primal, tangent


def formula(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    """What one would write by hand; products in the dtype of the operands, softmax in float32."""
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


@functools.cache
def _compiled_formula() -> Op:
    functorch_config.donated_buffer = False  # the backward runs many times
    return torch.compile(formula, dynamic=False)


def compiled(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    return _compiled_formula()(primals, tangents, causal)


def flash_jvp(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    op = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual
    with forward_ad.dual_level():
        dual = map(forward_ad.make_dual, primals, tangents)
        primal, tangent = forward_ad.unpack_dual(op(*dual, causal=causal))
    assert tangent is not None
    return primal, tangent


def finite_differences(primals: Triple, tangents: Triple, causal: bool) -> Pair:
    """Two ordinary forward passes: a tangent with half the digits, at best."""
    step = finite_difference_step(primals[0].dtype)
    query, key, value = (p + step * t for p, t in zip(primals, tangents, strict=True))
    output = plain(primals, causal)
    return output, (plain((query, key, value), causal) - output) / step


# --- from an op to the call that a group times ---------------------------------------------------


def _provider(name: str, case: Case, op: Op, **more) -> Provider:
    def prepare(case: Case, inputs: Operands) -> Call:
        if case.group != FORWARD:
            return _backward(op, inputs, case.group)
        return torch.no_grad()(lambda: op(inputs.primals, inputs.tangents, inputs.causal))

    question = name if name == "finite-differences" else DUAL[case.group]
    return Provider(name, prepare, functools.partial(_cost, question), **more)


def _backward(op: Op, inputs: Operands, group: str) -> Call:
    """The backward pass alone: the forward has run, and its graph is kept."""
    tangents = _leaves(inputs.tangents)
    if group == BACKWARD:
        _, output_t = op(inputs.primals, tangents, inputs.causal)
        return lambda: torch.autograd.grad(output_t, tangents, inputs.grads[1], retain_graph=True)
    primals = _leaves(inputs.primals)
    outputs = op(primals, tangents, inputs.causal)
    return lambda: torch.autograd.grad(
        outputs, (*tangents, *primals), inputs.grads, retain_graph=True
    )


def _yardstick(name: str, group: str) -> Provider:
    """Plain attention, or its backward pass to query, key and value, by one of the backends."""

    def prepare(case: Case, inputs: Operands) -> Call:
        if group == FORWARD:
            return torch.no_grad()(lambda: (plain(inputs.primals, inputs.causal, SDPA[name]),))
        leaves = _leaves(inputs.primals)
        output = plain(leaves, inputs.causal, SDPA[name])
        return lambda: torch.autograd.grad(output, leaves, inputs.grads[1], retain_graph=True)

    def why_not(case: Case, device: torch.device) -> str | None:
        on_cpu = device.type == "cpu" and name in ("sdpa-efficient", "sdpa-cudnn")
        return "CUDA alone has this backend" if on_cpu else None

    return Provider(name, prepare, functools.partial(_cost, PRIMAL[group]), why_not=why_not)


def _cost(question: str, case: Case):
    return attention_cost(question, case.shape, case.torch_dtype.itemsize, case.causal)


def _flash_jvp_is_missing(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("jvp_flash_attention") is None:
        return "not installed: pip install jvp-flash-attention"
    return None if device.type == "cuda" else "it runs on CUDA alone"


def _leaves(tensors: Triple) -> Triple:
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
    return query, key, value


def _corners(x: Tensor) -> Tensor:
    """The first and the last of batch and heads: wrong offsets show at the far end."""
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]
