"""The kernels of norms, activations, softmax and linear against PyTorch's rules in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sanitize_kernels import launch_rows
from tangent_ops import functional as ops
from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.backend import interpreting
from tangent_ops.ops.dual_op import _Dual
from tests.ops import oracle

DEVICE = "cpu" if interpreting() else "cuda"


class Op(NamedTuple):
    ours: Callable[..., Any]
    pytorchs: Callable[..., Any]
    shapes: Callable[[int, int], list[tuple[int, ...]]]  # of operands, by rows and width


def _layer_norm(x, w=1.0, b=0.0):
    """In words: gradients of a tangent through F.layer_norm miss those by mean and deviation."""
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b


def _added(x, r, w, b):
    return _layer_norm(x + r, w, b), x + r


OPS = {
    "layer_norm": Op(
        lambda x, w, b: ops.layer_norm(x, x.shape[-1:], w, b, backend="triton"),
        _layer_norm,
        lambda rows, width: [(2, rows, width), (width,), (width,)],
    ),
    "layer_norm, no affine": Op(
        lambda x: ops.layer_norm(x, x.shape[-1:], backend="triton"),
        _layer_norm,
        lambda rows, width: [(2, rows, width)],
    ),
    "add_layer_norm": Op(
        lambda x, r, w, b: ops.add_layer_norm(x, r, x.shape[-1:], w, b, backend="triton"),
        _added,
        lambda rows, width: [(2, rows, width), (2, rows, width), (width,), (width,)],
    ),
    "rms_norm": Op(
        lambda x, w: ops.rms_norm(x, x.shape[-1:], w, 1e-6, backend="triton"),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
        lambda rows, width: [(2, rows, width), (width,)],
    ),
    "gelu": Op(
        lambda x: ops.gelu(x, backend="triton"), F.gelu, lambda rows, width: [(rows, width)]
    ),
    "gelu, tanh": Op(
        lambda x: ops.gelu(x, "tanh", backend="triton"),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda rows, width: [(rows, width)],
    ),
    "silu": Op(
        lambda x: ops.silu(x, backend="triton"), F.silu, lambda rows, width: [(rows, width)]
    ),
    "geglu": Op(
        lambda x, v: ops.geglu(x, v, backend="triton"),
        lambda x, v: F.gelu(x) * v,
        lambda rows, width: [(rows, width), (rows, width)],
    ),
    "swiglu": Op(
        lambda x, v: ops.swiglu(x, v, backend="triton"),
        lambda x, v: F.silu(x) * v,
        lambda rows, width: [(rows, width), (rows, width)],
    ),
    "softmax": Op(
        lambda x: ops.softmax(x, -1, backend="triton"),
        lambda x: torch.softmax(x, -1),
        lambda rows, width: [(2, rows, width)],
    ),
    "linear": Op(
        lambda x, w, b: ops.linear(x, w, b, backend="triton"),
        F.linear,
        lambda rows, width: [(2, rows, width), (7, width), (7,)],
    ),
}


def operands(op: Op, rows=5, width=24, dtype=torch.float32, seed=0):
    """Primals and as many tangents."""
    source = torch.Generator().manual_seed(seed)

    def draw():
        return [
            torch.randn(shape, generator=source, dtype=torch.float64).to(DEVICE, dtype)
            for shape in op.shapes(rows, width)
        ]

    return draw(), draw()


def tuple_of(outputs) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def derivatives(function, primals, tangents, tracked: bool):
    """Outputs, their tangents, and gradients by the tangents, and by primals if ``tracked``."""
    primals = [p.detach().clone().requires_grad_(tracked) for p in primals]
    moving = [i for i, t in enumerate(tangents) if t is not None]
    given = [tangents[i].detach().clone().requires_grad_() for i in moving]

    def call(*some):
        every = list(primals)
        for i, x in zip(moving, some, strict=True):
            every[i] = x
        return tuple_of(function(*every))

    if tracked:
        outputs, outputs_t = torch.func.jvp(call, tuple(primals[i] for i in moving), tuple(given))
    else:
        pairs = []
        with torch.autograd.forward_ad.dual_level():
            dual = [
                torch.autograd.forward_ad.make_dual(primals[i], t)
                for i, t in zip(moving, given, strict=True)
            ]
            pairs = [torch.autograd.forward_ad.unpack_dual(y) for y in call(*dual)]
        outputs, outputs_t = [p[0] for p in pairs], [p[1] for p in pairs]
    results = [y for y in (*outputs, *outputs_t) if y is not None]
    source = torch.Generator().manual_seed(9)
    loss: Any = 0.0
    for y in results:
        weight = torch.randn(y.shape, generator=source, dtype=torch.float64).to(y)
        if y.requires_grad:
            loss = loss + (y * weight).sum()
    leaves = [*given, *(primals if tracked else [])]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [y.detach() for y in results], grads


def check(op: Op, primals, tangents, tracked: bool) -> None:
    found = derivatives(op.ours, primals, tangents, tracked)
    eager = derivatives(op.pytorchs, primals, tangents, tracked)
    exact = derivatives(op.pytorchs, oracle.double(primals), oracle.double(tangents), tracked)
    assert all(x.dtype == primals[0].dtype for x in (*found[0], *found[1]))
    oracle.assert_as_good_as(found, exact, eager)


@pytest.fixture
def own_calls(monkeypatch):
    calls = []
    original = _Dual.forward
    counted = staticmethod(lambda *a: calls.append(a[1]) or original(*a))
    monkeypatch.setattr(_Dual, "forward", counted)
    return calls


@pytest.mark.parametrize("tracked", [False, True], ids=["frozen", "tracked"])
@pytest.mark.parametrize("name", OPS)
def test_every_subset_of_tangents(name, tracked, own_calls, poisoned) -> None:
    op = OPS[name]
    primals, tangents = operands(op)
    for mask in range(1, 2 ** len(primals)):
        given = [t if mask >> i & 1 else None for i, t in enumerate(tangents)]
        own_calls.clear()
        with poisoned():
            check(op, primals, given, tracked)
        assert set(own_calls) == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tracked", [False, True], ids=["frozen", "tracked"])
@pytest.mark.parametrize("name", OPS)
def test_16_bit(name, tracked, dtype) -> None:
    op = OPS[name]
    check(op, *operands(op, dtype=dtype), tracked)


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 9))
@pytest.mark.parametrize("name", OPS)
def test_any_shape(name, rows, width, seed) -> None:
    op = OPS[name]
    if "norm" in name:
        width = max(width, 4)  # of fewer x̂ is nearly given, and derivatives are mostly rounding
    check(op, *operands(op, rows, width, seed=seed), tracked=seed % 2 == 0)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "softmax", "swiglu"])
def test_operands_that_do_not_follow_one_another_in_memory(name) -> None:
    op = OPS[name]
    primals, tangents = operands(op, rows=4, width=6)

    def spread(x):
        return torch.stack([x, x], -1)[..., 0] if x.ndim > 1 else x

    def halves(x):
        return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.ndim > 1 else x

    for change in (spread, halves):
        check(op, [change(x) for x in primals], [change(x) for x in tangents], False)


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "softmax", "rms_norm", "swiglu", "linear"])
@pytest.mark.parametrize("tracked", [False, True], ids=["frozen", "tracked"])
def test_derivatives_of_the_backward_pass(name, tracked) -> None:
    """By PyTorch's rules, from what the kernels saved."""
    op = OPS[name]
    results = []
    for function, convert in ((op.ours, lambda x: x), (op.pytorchs, oracle.double)):
        primals, tangents = convert(operands(op, 3, 8))
        primals = [p.requires_grad_(tracked) for p in primals]
        leaves = [t.requires_grad_() for t in tangents]
        if tracked:
            outputs = torch.func.jvp(function, tuple(primals), tuple(leaves))
            leaves = [*leaves, *primals]
        else:
            outputs = oracle.pushforward(function, primals, leaves)[1:]
        loss = sum((y.sin() * y).sum() for y in outputs)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for one, exact in zip(*results, strict=True):
        assert oracle.error(one, exact) <= 1e-4 * float(exact.norm()) + 1e-5


def test_gelu_near_zero_and_far_out() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-4, -4.0, 8.0, -30.0, 50.0], device=DEVICE)
    for name in ("gelu", "gelu, tanh", "silu"):
        check(OPS[name], [x], [torch.ones_like(x)], tracked=True)


def test_what_the_kernels_do_not_compute_is_said() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UnsupportedError, match="float64"):
        oracle.pushforward(lambda x: ops.gelu(x, backend="triton"), [x], [x])
    wide = torch.randn(1, 4097, device=DEVICE)
    with pytest.raises(UnsupportedError, match="4097 elements are longer than 4096"):
        oracle.pushforward(lambda x: ops.softmax(x, -1, backend="triton"), [wide], [wide])
    with pytest.raises(UnsupportedError, match="dim=0 is not the last"):
        one = x.float()
        oracle.pushforward(lambda x: ops.softmax(x, 0, backend="triton"), [one], [one])


def test_what_does_not_fit_is_not_read() -> None:
    """The kernels take a weight's address, and know no end of it."""
    x, line = torch.ones(2, 24, device=DEVICE), torch.ones(1, device=DEVICE)
    calls = [
        (lambda x, w: ops.layer_norm(x, (24,), w, backend="triton"), [x, line]),
        (lambda x, b: ops.layer_norm(x, (24,), None, b, backend="triton"), [x, line]),
        (lambda x: ops.layer_norm(x, (12,), backend="triton"), [x]),
        (lambda x, w: ops.rms_norm(x, (24,), w, backend="triton"), [x, line]),
        (lambda x: ops.rms_norm(x, (), backend="triton"), [x]),
        (lambda x, w: ops.add_layer_norm(x, x, (24,), w, backend="triton")[0], [x, line]),
    ]
    for call, operands in calls:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            oracle.pushforward(call, operands, operands)
    operands = [x, torch.ones(0, 24, device=DEVICE)]
    with pytest.raises(UnsupportedError, match="no elements"):
        oracle.pushforward(lambda *a: ops.linear(*a, backend="triton"), operands, operands)


def test_other_nestings_are_pytorchs(own_calls) -> None:
    x, t = (torch.randn(3, 4, device=DEVICE) for _ in range(2))
    for name in ("gelu", "silu", "softmax", "layer_norm, no affine"):
        op = OPS[name]
        mapped = torch.func.vmap(lambda t, f=op.ours: torch.func.jvp(f, (x,), (t,))[1])
        exact = torch.func.jvp(op.pytorchs, (x.double(),), (t.double(),))[1]
        torch.testing.assert_close(
            mapped(torch.stack([t, t]))[1].double(), exact, rtol=1e-4, atol=1e-5
        )
    assert not own_calls


def test_what_the_sanitizer_watches() -> None:
    launch_rows(70, torch.float16, DEVICE)
