"""decide: which code computes an attention call, row by row of its table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.ops import backend as backends
from tangent_ops.ops.attention.path import Path, decide

B, H, N, D = 2, 2, 5, 8


def operands(mask: bool = False, heads: int = H, dim: int = D) -> list[Tensor]:
    shapes = [(B, H, N, dim), (B, heads, N, dim), (B, heads, N, dim)] + [(N, N)] * mask
    return [torch.randn(shape) for shape in shapes]


def in_dual_level(tensors: list[Tensor], tracked: bool = False, **options) -> Path:
    with forward_ad.dual_level():
        query = tensors[0].requires_grad_(tracked)
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        return call(dual, *tensors[1:], **options)


def seen(transform: Callable[..., object], tensors: list[Tensor], **options) -> Path:
    """The path of the call that ``transform(function, query)`` makes in ``function``."""
    found = []

    def function(query):
        others = [x[0] for x in tensors[1:]] if query.ndim < 4 else tensors[1:]
        found.append(call(query, *others, **options))
        return query.sum()

    transform(function, tensors[0])
    return found[0]


def jvp(function, query):
    return torch.func.jvp(function, (query,), (query,))


def jvp_of_vmap(function, query):
    return jvp(torch.vmap(function), query)


def grad_of_jvp(function, query):
    return torch.func.grad(lambda x: jvp(function, x)[1])(query)


def traced_dual_level(function, query):
    def within(x):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, torch.ones_like(x)))

    return make_fx(within)(query)


def call(*tensors: Tensor, dropout_p: float = 0.0, backend: backends.Backend | None = None) -> Path:
    return decide(tensors, dropout_p, backend)


@contextmanager
def compiling(monkeypatch):
    with monkeypatch.context() as patch:
        for module in ("tangent_ops.ops.attention.path", "tangent_ops.ops.backend"):
            patch.setattr(f"{module}.is_compiling", lambda: True)
        yield


def test_without_tangents_pytorch_computes_unless_a_backend_is_named(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    assert call(*operands()) is Path.PYTORCH
    assert call(*operands(mask=True), dropout_p=0.5) is Path.PYTORCH
    assert call(*operands(), backend="reference") is Path.FORMULA
    assert call(*operands(), backend="triton") is Path.KERNELS
    with forward_ad.dual_level():
        assert call(*operands()) is Path.PYTORCH


@pytest.mark.parametrize("backend", [None, "reference"])
def test_formulas(backend, monkeypatch):
    assert in_dual_level(operands(), backend=backend) is Path.BLOCKS
    assert in_dual_level(operands(dim=7), backend=backend) is Path.BLOCKS
    assert in_dual_level(operands(mask=True), backend=backend) is Path.PAIR
    assert in_dual_level(operands(heads=1), backend=backend) is Path.PAIR
    assert in_dual_level(operands(), dropout_p=0.5, backend=backend) is Path.PAIR
    assert in_dual_level(operands(), tracked=True, backend=backend) is Path.FORMULA
    assert seen(traced_dual_level, operands(), backend=backend) is Path.PAIR
    assert seen(jvp, operands(), backend=backend) is Path.PAIR
    assert seen(jvp_of_vmap, operands(), backend=backend) is Path.FORMULA
    assert seen(grad_of_jvp, operands(), backend=backend) is Path.FORMULA
    with compiling(monkeypatch):
        assert in_dual_level(operands(), backend=backend) is Path.FORMULA


def test_kernels(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    for options in ({}, {"dropout_p": 0.5}):
        assert in_dual_level(operands(), backend="triton", **options) is Path.KERNELS
        assert in_dual_level(operands(mask=True), backend="triton", **options) is Path.KERNELS
    assert in_dual_level(operands(), tracked=True, backend="triton") is Path.KERNELS_RULE
    assert seen(jvp, operands(), backend="triton") is Path.KERNELS
    assert seen(jvp_of_vmap, operands(), backend="triton") is Path.KERNELS_RULE
    assert seen(grad_of_jvp, operands(), backend="triton") is Path.KERNELS
    with compiling(monkeypatch):
        assert in_dual_level(operands(), tracked=True, backend="triton") is Path.KERNELS


def test_what_the_kernels_do_not_compute_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    with pytest.raises(UnsupportedError, match="head_dim 7"):
        call(*operands(dim=7), backend="triton")
    with pytest.raises(UnsupportedError, match="float64"):
        call(*(x.double() for x in operands()), backend="triton")
    with pytest.raises(ArgumentError, match="backend='cuda'"):
        call(*operands(), backend="cuda")  # pyright: ignore[reportArgumentType]
