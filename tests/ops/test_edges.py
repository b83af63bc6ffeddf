"""Inputs at the edges: one vector, no elements, five dimensions, meta tensors, odd dtypes.

Every subset of tangents in a dual level, and the gradient of the tangent, against torch.func.jvp of
the formula spelled out in float64.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent_ops import functional, fused_forward_ad
from tangent_ops.errors import ArgumentError
from tests.ops import oracle

attention = functional.scaled_dot_product_attention


def draw(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=source, dtype=torch.float64)


def derivatives(op, primals, tangents, level: bool):
    """Output, tangent and the tangent's gradients by the tangents that are given."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tangents]
    given = [i for i, t in enumerate(leaves) if t is not None]
    if level:
        output, output_t = oracle.pushforward(op, primals, leaves)
    else:

        def of_given(*some):
            operands = list(primals)
            for i, x in zip(given, some, strict=True):
                operands[i] = x
            return op(*operands)

        output, output_t = torch.func.jvp(
            of_given, tuple(primals[i] for i in given), tuple(leaves[i] for i in given)
        )
    weights = torch.arange(output_t.numel(), dtype=torch.float64, device=output.device).cos()
    loss = (output_t * weights.reshape(output_t.shape)).sum()
    wanted = [leaves[i] for i in given]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [output.detach(), output_t.detach(), *grads]


def every_subset(primals):
    for present in itertools.product([True, False], repeat=len(primals)):
        if any(present):
            yield [p.cos() if here else None for p, here in zip(primals, present, strict=True)]


def assert_right(ours, spelled_out, primals) -> None:
    for tangents in every_subset(primals):
        exact = derivatives(spelled_out, primals, tangents, level=False)
        for level in (True, False):
            found = derivatives(ours, primals, tangents, level)
            torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def norm(x, weight=None, bias=None, *, dims: int, centered: bool, eps: float):
    over = tuple(range(-dims, 0))
    x = x - x.mean(over, keepdim=True) if centered else x
    x = x * (x.square().mean(over, keepdim=True) + eps).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def without_weight(norm, x, bias):
    return norm(x, None, bias)


def sigmoid_gate(x):
    return x / (1 + (-x).exp())


def erf_gate(x):
    return x * (1 + torch.erf(x * 0.5**0.5)) / 2


def normalized(x, dim=-1):
    return x.exp() / x.exp().sum(dim, keepdim=True)


SHAPES = [(), (3,), (0,), (2, 3), (2, 0), (0, 3), (2, 1, 2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape) -> None:
    assert_right(functional.gelu, erf_gate, [draw(*shape)])
    assert_right(functional.silu, sigmoid_gate, [draw(*shape)])


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape) -> None:
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        assert_right(
            lambda x, dim=dim: functional.softmax(x, dim),
            lambda x, dim=dim: normalized(x, dim) if x.ndim else x - x + 1,
            [draw(*shape)],
        )


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("channels", [4, 0])
def test_linear(shape, channels) -> None:
    primals = [draw(*shape), draw(channels, shape[-1]), draw(channels)]
    assert_right(functional.linear, lambda x, w, b: (x[..., None, :] * w).sum(-1) + b, primals)
    assert_right(functional.linear, lambda x, w: (x[..., None, :] * w).sum(-1), primals[:2])
    # A weight for one output, and a bias that is broadcast: PyTorch's own.
    assert_right(functional.linear, lambda x, w: (x * w).sum(-1), [primals[0], draw(shape[-1])])


def test_linear_with_a_bias_that_is_broadcast() -> None:
    primals = [draw(2, 3), draw(4, 3), draw(1, 4)]
    assert_right(functional.linear, lambda x, w, b: (x[..., None, :] * w).sum(-1) + b, primals)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_norms(shape) -> None:
    eps = 1e-3
    for dims in {1, len(shape)}:
        last = shape[-dims:]
        x, weight, bias = draw(*shape), draw(*last), draw(*last).sin()
        spelled = functools.partial(norm, dims=dims, eps=eps)

        def layer_norm(x, weight=None, bias=None, last=last):
            return functional.layer_norm(x, last, weight, bias, eps)

        def rms_norm(x, weight=None, last=last):
            return functional.rms_norm(x, last, weight, eps)

        centered = functools.partial(spelled, centered=True)
        for primals in ([x, weight, bias], [x]):
            assert_right(layer_norm, centered, primals)
        assert_right(
            functools.partial(without_weight, layer_norm),
            functools.partial(without_weight, centered),
            [x, bias],
        )
        for primals in ([x, weight], [x]):
            assert_right(rms_norm, functools.partial(spelled, centered=False), primals)


@pytest.mark.parametrize("function", [F.conv1d, F.conv2d, F.conv3d])
@pytest.mark.parametrize("lead", [(2,), (0,), ()], ids=["two", "none", "unbatched"])
@pytest.mark.parametrize("channels", [2, 0])
def test_convolutions(function, lead, channels) -> None:
    """Against PyTorch's own rule by torch.func.jvp: what is spelled out is the subset."""
    spatial = (F.conv1d, F.conv2d, F.conv3d).index(function) + 1
    primals = [draw(*lead, channels, *[4] * spatial), draw(4, channels, *[2] * spatial), draw(4)]
    assert_right(functools.partial(functional.convolution, function), function, primals)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0, 3), (2, 0), (1, 2, 2), (2, 0, 3)])
def test_attention(lead) -> None:
    def spelled_out(query, key, value, mask=None):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return normalized(scores if mask is None else scores + mask) @ value

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

META = {
    "linear": (F.linear, [(2, 3, 6), (4, 6), (4,)]),
    "conv2d": (F.conv2d, [(2, 3, 6, 6), (4, 3, 2, 2), (4,)]),
    "layer_norm": (lambda x, *a: F.layer_norm(x, (6,), *a), [(2, 6), (6,), (6,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), [(2, 6), (6,)]),
    "softmax": (lambda x: F.softmax(x, -1), [(2, 6)]),
    "gelu": (F.gelu, [(2, 6)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 4, 8)] * 3),
    "masked attention": (F.scaled_dot_product_attention, [(2, 3, 4, 8)] * 3 + [(4, 4)]),
    "causal attention": (
        functools.partial(F.scaled_dot_product_attention, is_causal=True),
        [(2, 3, 4, 8)] * 3,
    ),
}


@pytest.mark.parametrize("level", [True, False])
@pytest.mark.parametrize("name", META)
def test_meta_tensors_have_the_shapes_of_others(name, level) -> None:
    op, shapes = META[name]
    found = {}
    for device in ("meta", "cpu"):
        primals = [draw(*shape).to(device) for shape in shapes]
        with fused_forward_ad():
            found[device] = [derivatives(op, primals, t, level) for t in every_subset(primals)]
    for meta, cpu in zip(found["meta"], found["cpu"], strict=True):
        assert all(x.is_meta for x in meta)
        assert [(x.shape, x.dtype) for x in meta] == [(x.shape, x.dtype) for x in cpu]


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
    # Central differences: step² for what they leave out, a rounding over the step.
    torch.testing.assert_close(output_t, (around[0] - around[1]) / (2 * step), rtol=0, atol=1e-8)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == kept
