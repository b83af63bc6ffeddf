"""Fused operations in traced code: torch.func.linearize, make_fx and torch.export."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import tangent_ops
from tangent_ops import fused_forward_ad
from tests.ops import oracle
from tests.ops.dual_ops import ATTENTION, OPS

# PyTorch's own warning, of constants that it folds.
pytestmark = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")

attention = tangent_ops.scaled_dot_product_attention


def draw(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=source, dtype=torch.float64)


X = draw(2, 3, 4, 6)


def close(found, exact) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


# Left to PyTorch, whose graph adds eps to a constant in place, once more in each call.
WRONG_IN_PYTORCH = "rms_norm, two dimensions"


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", [n for n in OPS | ATTENTION if n != WRONG_IN_PYTORCH])
def test_linearize(name, backend) -> None:
    op = (OPS | ATTENTION)[name]
    primals, _ = op.draw((3,), 8)
    backends = {} if backend is None else {"backend": backend}
    ours = functools.partial(op.ours, **backends)
    for moving in (range(len(primals)), [len(primals) - 1]):  # all operands, and the last alone
        some = tuple(primals[i] for i in moving)
        output, along = torch.func.linearize(oracle.of_some(ours, primals, moving), *some)
        for phase in (1.0, 2.0):  # a call must leave the next one right
            tangents = tuple((3 * p + phase).sin() for p in some)
            exact = torch.func.jvp(oracle.of_some(op.exact, primals, moving), some, tangents)
            close((output, along(*tangents)), exact)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_linearize_of_a_routed_model(backend) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, F.gelu, batch_first=True).double()
    x, x_t = X[0], X[1]

    def exact(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return layer(x)

    with torch.no_grad(), fused_forward_ad(backend):
        output, along = torch.func.linearize(layer, x)
        found_t = along(x_t)
    with torch.no_grad():
        close((output, found_t), torch.func.jvp(exact, (x,), (x_t,)))


def by_jvp(q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda q: attention(q, q, q), (q,), (t,))


def by_level(q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, t)
        return tuple(forward_ad.unpack_dual(attention(q, q, q)))


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(q, t)


Q, Q_T, Q_T2 = draw(2, 3, 4, 5), draw(2, 3, 4, 5).sin(), draw(2, 3, 4, 5).cos()


def exact_attention(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda q: oracle.math_attention(q, q, q), (Q,), (t,))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("function", [by_jvp, by_level], ids=lambda f: f.__name__)
def test_make_fx(function, mode) -> None:
    graph = make_fx(function, tracing_mode=mode)(Q, Q_T)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    for t in (Q_T, Q_T2):
        close(graph(Q, t), exact_attention(t))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 exports no forward mode")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", [by_jvp, by_level], ids=lambda f: f.__name__)
def test_export(function, strict) -> None:
    program = torch.export.export(Call(function), (Q, Q_T), strict=strict).module()
    for t in (Q_T, Q_T2):
        close(program(Q, t), exact_attention(t))


def test_linearize_in_a_function_that_dynamo_breaks() -> None:
    def twice(q: Tensor) -> Tensor:
        return torch.func.linearize(lambda q: attention(q, q, q), 2 * q)[1](Q_T)

    torch._dynamo.reset()
    found = torch.compile(twice, backend="aot_eager")(Q)
    exact = torch.func.jvp(lambda q: oracle.math_attention(q, q, q), (2 * Q,), (Q_T,))[1]
    close(found, exact)
