"""Attention and its tangent: ours against `torch.func.jvp` under PyTorch's MATH backend.

Run by pytest-benchmark. Each case is checked against float64 before it is timed, so that nothing
wrong gets a number. The plain call, which has no tangent, shows the floor.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops import scaled_dot_product_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Batch, heads, tokens, head dimension: a ViT at 98, 224 and 448 px; longer rows where they fit.
SHAPES = (
    [(64, 12, 197, 64), (16, 12, 1025, 64), (2, 12, 4096, 64), (2, 12, 4096, 128)]
    if CUDA
    else [(8, 6, 50, 64), (8, 6, 197, 64)]
)
# Relative error, norm over norm: a few roundings of the inputs' dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Triple = tuple[Tensor, Tensor, Tensor]  # query, key, value
Pair = tuple[Tensor, Tensor]  # output and tangent
Rival = Callable[[Triple, Triple], Pair]


def plain(primals: Triple, tangents: Triple) -> Pair:
    """The primal alone, by whichever backend PyTorch picks; its output stands in for a tangent."""
    output = F.scaled_dot_product_attention(*primals)
    return output, output


def ours(primals: Triple, tangents: Triple) -> Pair:
    with fwAD.dual_level():
        query, key, value = map(fwAD.make_dual, primals, tangents)
        primal, tangent = fwAD.unpack_dual(scaled_dot_product_attention(query, key, value))
    assert tangent is not None
    return primal, tangent


def math(primals: Triple, tangents: Triple) -> Pair:
    with sdpa_kernel(SDPBackend.MATH):
        primal, tangent, *_ = torch.func.jvp(F.scaled_dot_product_attention, primals, tangents)
    return primal, tangent


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def data(request: pytest.FixtureRequest) -> tuple[Triple, Triple]:
    """Query, key and value as timm's packed qkv gives them, and their tangents."""
    batch, heads, tokens, depth = request.param
    generator = torch.Generator(DEVICE).manual_seed(0)

    def packed() -> Triple:
        shape = (batch, tokens, 3, heads, depth)
        qkv = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    return packed(), packed()


@pytest.mark.parametrize("rival", [plain, math, ours])
def test_forward(benchmark, data: tuple[Triple, Triple], rival: Rival) -> None:
    primals, tangents = data
    benchmark.group = f"forward {tuple(primals[0].shape)}"

    @torch.no_grad()
    def call() -> Pair:
        return rival(primals, tangents)

    if rival is not plain:
        _check(call(), _oracle(primals, tangents))
    _time(benchmark, call)


@pytest.mark.parametrize("rival", [plain, math, ours])
def test_step(benchmark, data: tuple[Triple, Triple], rival: Rival) -> None:
    """Forward, then the tangent's backward to the tangents; `plain`: the output's to q, k, v."""
    primals, tangents = data
    benchmark.group = f"forward + backward {tuple(primals[0].shape)}"
    cotangent = torch.randn_like(primals[0])
    leaves = _leaves(primals if rival is plain else tangents)
    inputs = (leaves, tangents) if rival is plain else (primals, leaves)

    def call() -> tuple[Tensor, ...]:
        _, output = rival(*inputs)
        return torch.autograd.grad(output, leaves, cotangent)

    if rival is not plain:
        _check(call(), _oracle_gradients(primals, cotangent))
    _time(benchmark, call)


def _time(benchmark, call: Callable[[], object]) -> None:
    def synchronized() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=100 if CUDA else 30, warmup_rounds=5)


def _oracle(primals: Triple, tangents: Triple) -> Pair:
    return math(_double(primals), _double(tangents))


def _oracle_gradients(primals: Triple, cotangent: Tensor) -> tuple[Tensor, ...]:
    """The transpose of J, which the tangent's backward is: PyTorch's own plain backward."""
    leaves = _leaves(_double(primals))
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(*leaves)
    return torch.autograd.grad(output, leaves, cotangent[:1].double())


def _leaves(tensors: Triple) -> Triple:
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
    return query, key, value


def _double(tensors: Triple) -> Triple:
    """The first sample in float64: the oracle holds N x N matrices, several at once."""
    query, key, value = (tensor[:1].double() for tensor in tensors)
    return query, key, value


def _check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, true in zip(found, expected, strict=True):
        error = (one[:1].double() - true).norm() / true.norm()
        assert error <= TOLERANCE[DTYPE], f"relative error {error:.1e}: not worth timing"
