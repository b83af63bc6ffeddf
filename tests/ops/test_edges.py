"""Inputs at the edges: one vector, no elements, five dimensions, meta tensors, odd dtypes.

test_dual_ops.py gives one vector, no elements and five dimensions to every operation.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tangent_ops import functional, fused_forward_ad
from tangent_ops.errors import ArgumentError
from tests.ops import oracle
from tests.ops.contract import check, derivatives
from tests.ops.dual_ops import ATTENTION, OPS, Op

attention = functional.scaled_dot_product_attention


def draw(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=source, dtype=torch.float64)


def assert_right(ours, spelled_out, primals) -> None:
    for present in itertools.product([True, False], repeat=len(primals)):
        if any(present):
            given = [p.cos() if here else None for p, here in zip(primals, present, strict=True)]
            for level in (True, False):
                op = Op(ours, spelled_out, lambda lead, width: [])
                check(op, ours, primals, given, False, level, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3), (2, 0), (0, 3), (2, 1, 2, 1, 3)])
@pytest.mark.parametrize("channels", [4, 0])
def test_linear(shape, channels) -> None:
    def words(x, w, b=0.0):
        return (x[..., None, :] * w).sum(-1) + b

    primals = [draw(*shape), draw(channels, shape[-1]), draw(channels)]
    for count in (2, 3):
        assert_right(functional.linear, words, primals[:count])
    # A weight for one output, and a bias that is broadcast: PyTorch's own.
    assert_right(functional.linear, lambda x, w: (x * w).sum(-1), [primals[0], draw(shape[-1])])
    assert_right(functional.linear, words, [draw(2, 3), draw(4, 3), draw(1, 4)])


@pytest.mark.parametrize("function", [F.conv1d, F.conv2d, F.conv3d])
@pytest.mark.parametrize("lead", [(2,), (0,), ()], ids=["two", "none", "unbatched"])
@pytest.mark.parametrize("channels", [2, 0])
def test_convolutions(function, lead, channels) -> None:
    """Against PyTorch's own rule, by torch.func.jvp."""
    spatial = (F.conv1d, F.conv2d, F.conv3d).index(function) + 1
    primals = [draw(*lead, channels, *[4] * spatial), draw(4, channels, *[2] * spatial), draw(4)]
    assert_right(functools.partial(functional.convolution, function), function, primals)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0, 3), (2, 0), (1, 2, 2), (2, 0, 3)])
def test_attention(lead) -> None:
    def spelled_out(query, key, value, mask=None):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return (scores if mask is None else scores + mask).softmax(-1) @ value

    primals = [draw(*lead, 3, 2), draw(*lead, 4, 2), draw(*lead, 4, 5), draw(3, 4)]
    assert_right(attention, spelled_out, primals[:3])
    assert_right(attention, spelled_out, primals)
    assert_right(functools.partial(attention, backend="reference"), spelled_out, primals)


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("empty", [-1, -2])
def test_attention_without_tokens_or_head_dim_is_refused(lead, backend, name, empty) -> None:
    shapes = {"query": [3, 2], "key": [4, 2], "value": [4, 5]}
    shapes[name][empty] = 0
    operands = [draw(*lead, *shape) for shape in shapes.values()]
    with pytest.raises(ArgumentError, match=rf"{name} is \(.*expected a token and a head_dim"):
        torch.func.jvp(
            functools.partial(attention, backend=backend), tuple(operands), tuple(operands)
        )


@pytest.mark.parametrize("mode", ["level", "jvp", "jvp of jvp", "compiled"])
@pytest.mark.parametrize(
    "op, shapes",
    [
        (lambda x, w: F.layer_norm(x, (6,), w), [(2, 6), (1,)]),
        (lambda x, b: F.layer_norm(x, (6,), None, b), [(2, 6), ()]),
        (lambda x: F.layer_norm(x, (3,)), [(2, 6)]),
        (lambda x, w: F.rms_norm(x, (6,), w), [(2, 6), (1,)]),
        (lambda x, w: F.rms_norm(x, (6,), w), [(2, 6), (2, 6)]),
        (lambda x: F.rms_norm(x, (3,)), [(2, 6)]),
        (lambda x: F.rms_norm(x, ()), [(2, 6)]),
        (lambda x, w: F.conv1d(x, w), [(2, 3, 5, 5), (4, 3, 2, 2)]),
        (lambda x, w: F.linear(x, w), [(2, 6), (4, 5)]),
        (lambda x, w, b: F.linear(x, w, b), [(2, 6), (4, 6), (3,)]),
    ],
)
def test_shapes_that_pytorch_refuses_are_refused(op, shapes, mode) -> None:
    primals = tuple(draw(*shape) for shape in shapes)

    def routed(*primals):
        with fused_forward_ad():
            return op(*primals)

    def jvp(*primals):
        return torch.func.jvp(routed, primals, primals)

    with pytest.raises(RuntimeError):
        op(*primals)
    with pytest.raises(RuntimeError):
        if mode == "level":
            oracle.pushforward(routed, primals, primals)
        elif mode == "jvp":
            jvp(*primals)
        elif mode == "compiled":
            torch._dynamo.reset()
            torch.compile(jvp, backend="eager")(*primals)
        else:
            torch.func.jvp(lambda *p: jvp(*p)[1], primals, primals)


COMPLEX = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "linear": lambda x: F.linear(x, x[0]),
    "conv1d": lambda x: F.conv1d(x, x[:, :, :2]),
    "silu": F.silu,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_pytorchs(name) -> None:
    x = torch.complex(draw(3, 3, 4), draw(3, 3, 4).sin())
    x_t = torch.complex(draw(3, 3, 4).cos(), draw(3, 3, 4))
    exact = torch.func.jvp(COMPLEX[name], (x,), (x_t,))
    with fused_forward_ad():
        found = oracle.pushforward(COMPLEX[name], [x], [x_t])
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(torch.func.jvp(COMPLEX[name], (x,), (x_t,)), exact)


# --- masks ---------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("of_mask", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_additive_mask_of_another_dtype_is_pytorchs_or_refused(dtype, of_mask, backend) -> None:
    query, mask = draw(1, 2, 4, 8).to(dtype), draw(4, 4).to(of_mask)

    def ours(query):
        return attention(query, query, query, mask, backend=backend)

    def eager(query, mask=mask):
        return oracle.math_attention(query, query, query, mask)

    try:
        eager(query)
    except RuntimeError:
        with pytest.raises(ArgumentError, match=f"attn_mask is {of_mask} but query is {dtype}"):
            torch.func.jvp(ours, (query,), (query,))
        return
    if backend == "triton":  # on a CPU
        return
    found = torch.func.jvp(ours, (query,), (query,))
    assert found[0].dtype == found[1].dtype == dtype
    exact = torch.func.jvp(lambda q: eager(q, mask.double()), (query.double(),), (query.double(),))
    oracle.assert_as_good_as(found, exact, torch.func.jvp(eager, (query,), (query,)))


# --- meta tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("level", [True, False])
@pytest.mark.parametrize("name", [*OPS, *ATTENTION])
def test_meta_tensors_have_the_shapes_of_others(name, level) -> None:
    op = (OPS | ATTENTION)[name]
    meta, cpu = (
        derivatives(op.ours, *op.draw((2,), 6, device=device), False, level)
        for device in ("meta", "cpu")
    )
    for one, other in zip(tree_leaves(meta), tree_leaves(cpu), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


# --- recurrent layers ----------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_where_global_flags_are_frozen(layer, monkeypatch) -> None:
    """After torch.backends.disable_global_flags(), as PyTorch's own tests call it."""
    flags = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError, match="after disable_global_flags"):
        torch.backends.mkldnn.enabled = False
    model, x = layer(3, 4).double(), draw(5, 2, 3)
    x_t = x.cos()
    kept = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    with fused_forward_ad():
        output, output_t = oracle.pushforward(lambda x: model(x)[0], [x], [x_t])
    step = 1e-6
    around = [model(x + sign * step * x_t)[0] for sign in (1, -1)]
    torch.testing.assert_close(output, model(x)[0])
    # Central differences err by step², and by a rounding divided by the step.
    torch.testing.assert_close(output_t, (around[0] - around[1]) / (2 * step), rtol=0, atol=1e-8)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == kept
