"""Every op that a program may call, a map of (2, 3, 8), and its formula in elementary operations.

An op is a function of its options that returns a :class:`Case`. ``OPS`` lists the options' values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops import scaled_dot_product_attention

SHAPE = (2, 3, 8)  # images, tokens, channels; convolutions take the tokens for channels
HEADS = 2


@dataclass(frozen=True)
class Case:
    """An op with its options.

    Attributes:
        shapes: of its operands beside the input.
        call: (input, *operands) -> output, as users write it.
        exact: the same by elementary operations.
        plain: the same by PyTorch alone, where ``call`` is not.
    """

    shapes: list[tuple[int, ...]]
    call: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    plain: Callable[..., Tensor] | None = None


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def on_one_row(function):
    """The op of one vector, without a batch."""
    return lambda x, *operands: x * function(x[0, 1], *operands)


seen_scores: list[float] = []  # the largest of each exact attention, since it was last cleared


def exact_softmax(x: Tensor, dim: int) -> Tensor:
    powers = (x - x.detach().amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def exact_attention(query, key, value, scale, keep=None, added=None) -> Tensor:
    scores = query @ key.mT * scale
    scores = scores if added is None else scores + added
    seen_scores.append(float(torch.func.debug_unwrap(scores).detach().abs().max()))
    powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    powers = powers if keep is None else powers * keep
    total = powers.sum(-1, keepdim=True)
    return powers / (total + (total == 0)) @ value  # a row that sees nothing is 0


def attention(mask, grouped, keys, scale, own):
    """``own``: this library's function and its reference backend, not F's."""
    at = SHAPE[1]
    key = (2, 1 if grouped else HEADS, keys, 4)
    seen = torch.ones(at, keys, dtype=torch.bool).tril()
    if mask == "bool":
        seen = (torch.arange(at * keys).reshape(at, keys) % 3 > 0) & (torch.arange(at) > 0)[:, None]
    options: dict[str, Any] = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": grouped}

    def call(function, x, key, value, added=None):
        chosen = seen if mask == "bool" else added
        return merge_heads(function(split_heads(x), key, value, chosen, **options))

    def exact(x, key, value, added=None):
        keep = seen if mask in ("bool", "causal") else None
        factor = 0.5 if scale is None else scale
        return merge_heads(exact_attention(split_heads(x), key, value, factor, keep, added))

    ours = functools.partial(scaled_dot_product_attention, backend="reference")
    shapes = [key, key, (2, 1, at, keys)] if mask == "float" else [key, key]
    torchs = functools.partial(call, F.scaled_dot_product_attention)
    return Case(shapes, functools.partial(call, ours) if own else torchs, exact, torchs)


def multi_head_attention(need_weights, bias):
    def call(x, into, out, shift, into_shift=None):
        x = x.transpose(0, 1)
        y, weights = F.multi_head_attention_forward(
            x, x, x, 8, HEADS, into, into_shift, None, None, False, 0.0, out, shift,
            training=False, need_weights=need_weights,
        )  # fmt: skip
        y = y.transpose(0, 1)
        return y if weights is None else y + weights @ x.transpose(0, 1)

    def exact(x, into, out, shift, into_shift=0.0):
        query, key, value = (split_heads(p) for p in (x @ into.mT + into_shift).chunk(3, -1))
        y = merge_heads(exact_attention(query, key, value, 0.5)) @ out.mT + shift
        weights = exact_softmax(query @ key.mT * 0.5, -1).mean(1)
        return y + weights @ x if need_weights else y

    return Case([(24, 8), (8, 8), (8,), *[(24,)] * bias], call, exact)


def linear(bias, one_row):
    def exact(x, weight, shift=0.0):
        return (x[..., None, :] * weight).sum(-1) + shift

    wrap = on_one_row if one_row else lambda f: f
    return Case([(8, 8), *[(8,)] * bias], wrap(F.linear), wrap(exact))


def convolution(spatial, bias, groups, dilation, padding):
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    sizes = ((8,), (2, 4), (2, 2, 2))[spatial - 1]
    pad = "same" if padding == "same" else dilation

    def call(x, weight, shift=None):
        y = function(x.unflatten(2, sizes), 0.3 * weight, shift, 1, pad, dilation, groups)
        return y.flatten(2)

    def exact(x, weight, shift=None):
        x = F.pad(x.unflatten(2, sizes), [dilation] * (2 * spatial))
        total: Any = 0.0
        for place in torch.cartesian_prod(*[torch.arange(3)] * spatial).reshape(-1, spatial):
            tap, part = 0.3 * weight, x
            for axis, (at, size) in enumerate(zip(place.tolist(), sizes, strict=True), 2):
                tap, part = tap.select(2, at), part.narrow(axis, at * dilation, size)
            part = part.flatten(2)
            if groups == 1:
                total = total + (tap[None, :, :, None] * part[:, None]).sum(2)
            else:  # a channel each
                total = total + tap * part
        return total if shift is None else total + shift[:, None]

    return Case([(3, 3 // groups, *[3] * spatial), *[(3,)] * bias], call, exact)


def exact_norm(x: Tensor, dims, eps: float, centered: bool = True) -> Tensor:
    if centered:
        x = x - x.mean(dims, keepdim=True)
    return x / ((x * x).mean(dims, keepdim=True) + eps).sqrt()


def layer_norm(spelling, dims, weight, bias, one_row):
    dims = 1 if one_row else dims
    shape = SHAPE[-dims:]
    every = tuple(range(-dims, 0))

    def operands(rest):
        rest = list(rest)
        return rest.pop(0) if weight else None, rest.pop(0) if bias else None

    def call(x, *rest):
        if spelling == "native":
            return torch.native_layer_norm(x, shape, *operands(rest), 1e-5)[0]
        return (F if spelling == "F" else torch).layer_norm(x, shape, *operands(rest))

    def exact(x, *rest):
        scale, shift = operands(rest)
        y = exact_norm(x, every, 1e-5)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    wrap = on_one_row if one_row else lambda f: f
    return Case([shape] * (weight + bias), wrap(call), wrap(exact))


def rms_norm(spelling, dims, weight, one_row):
    dims = 1 if one_row else dims
    shape = SHAPE[-dims:]
    function = F.rms_norm if spelling == "F" else torch.rms_norm
    every = tuple(range(-dims, 0))

    def call(x, scale=None):
        return function(x, shape, scale, 1e-5)

    def exact(x, scale=1.0):
        return exact_norm(x, every, 1e-5, centered=False) * scale

    wrap = on_one_row if one_row else lambda f: f
    return Case([shape] * weight, wrap(call), wrap(exact))


def channel_norm(kind, weight):
    """Batch, instance and group norm: over what else than a channel, a group."""
    running = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    dims = {"batch": (0, 2), "instance": (2,), "group": (1, 2)}.get(kind)

    def call(x, scale=None, shift=None):
        if kind == "group":
            return F.group_norm(x, 1, scale, shift)
        if kind == "instance":
            return F.instance_norm(x, weight=scale, bias=shift)
        if kind == "batch":
            return F.batch_norm(x, None, None, scale, shift, training=True)
        mean, variance = (part.to(x.dtype) for part in running)
        return F.batch_norm(x, mean, variance, scale, shift)

    def exact(x, scale=None, shift=None):
        if dims is None:
            mean, variance = (part.to(x.dtype)[:, None] for part in running)
            y = (x - mean) / (variance + 1e-5).sqrt()
        else:
            y = exact_norm(x, dims, 1e-5)
        return y if scale is None or shift is None else y * scale[:, None] + shift[:, None]

    return Case([(3,), (3,)] if weight else [], call, exact)


def exact_gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


def exact_sigmoid(x: Tensor) -> Tensor:
    return 0.5 * (1 + (0.5 * x).tanh())


def gelu(approximate):
    return Case(
        [],
        lambda x: F.gelu(x, approximate=approximate),
        lambda x: exact_gelu(x, approximate),
    )


def silu(inplace):
    def call(x):
        return F.silu(x * 1.5, inplace=inplace)

    return Case([], call, lambda x: 1.5 * x * exact_sigmoid(1.5 * x))


def hardsigmoid(inplace):
    def call(x):
        return F.hardsigmoid(x * 4.0, inplace=inplace)

    return Case([], call, lambda x: (4.0 * x + 3.0).clamp(0.0, 6.0) / 6.0)


def softmax(spelling, dim, dtype):
    def call(x):
        wide = torch.float64 if dtype == "float64" else None
        if spelling == "Tensor":
            return x.softmax(dim, dtype=wide).to(x.dtype)
        return (F if spelling == "F" else torch).softmax(x, dim, dtype=wide).to(x.dtype)

    return Case([], call, lambda x: exact_softmax(x, dim))


def glu():
    def call(x, gate):
        return F.glu(torch.cat([x, gate], -1))

    return Case([SHAPE], call, lambda x, gate: x * exact_sigmoid(gate))


def normalize(p, dim):
    def exact(x):
        powers = x * x if p == 2.0 else x.abs() ** p
        total = powers.sum(dim, keepdim=True)
        nothing = total == 0  # where the root has no slope
        return x / torch.where(nothing, 1e-12, torch.where(nothing, 1.0, total) ** (1 / p))

    return Case([], lambda x: F.normalize(x, p, dim), exact)


def recurrent(kind, bias):
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[kind]

    def call(x, hidden, cell, *weights):
        start: Any = (hidden, cell) if kind == "lstm" else hidden
        function = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh}[kind]
        return function(x, start, list(weights), bias, 1, 0.0, False, False, True)[0]

    def exact(x, hidden, cell, into, across, into_shift=0.0, across_shift=0.0):
        hidden, cell = hidden[0], cell[0]
        outputs = []
        for step in x.unbind(1):
            one = step @ into.mT + into_shift
            two = hidden @ across.mT + across_shift
            if kind == "rnn_tanh":
                hidden = (one + two).tanh()
            elif kind == "lstm":
                keep_in, forget, new, out = (one + two).chunk(4, -1)
                cell = exact_sigmoid(forget) * cell + exact_sigmoid(keep_in) * new.tanh()
                hidden = exact_sigmoid(out) * cell.tanh()
            else:
                (reset, update, new), (reset_h, update_h, new_h) = (
                    one.chunk(3, -1),
                    two.chunk(3, -1),
                )
                new = (new + exact_sigmoid(reset + reset_h) * new_h).tanh()
                update = exact_sigmoid(update + update_h)
                hidden = (1 - update) * new + update * hidden
            outputs.append(hidden)
        return torch.stack(outputs, 1)

    weights = [(8 * gates, 8)] * 2 + [(8 * gates,)] * (2 * bias)
    return Case([(1, 2, 8), (1, 2, 8), *weights], call, exact)


BOTH = (False, True)
# Of each: its options' values.
OPS: dict[str, tuple[Callable[..., Case], dict[str, tuple]]] = {
    "attention": (
        attention,
        dict(
            mask=(None, None, "bool", "float", "causal"),
            grouped=BOTH, keys=(3, 5), scale=(None, 0.3), own=BOTH,
        ),
    ),
    "multi_head_attention": (multi_head_attention, dict(need_weights=BOTH, bias=BOTH)),
    "linear": (linear, dict(bias=BOTH, one_row=BOTH)),
    "convolution": (
        convolution,
        dict(
            spatial=(1, 2, 3), bias=BOTH, groups=(1, 3), dilation=(1, 2), padding=("same", "sizes")
        ),
    ),
    "layer_norm": (
        layer_norm,
        dict(
            spelling=("F", "F", "torch", "native"),
            dims=(1, 2), weight=BOTH, bias=BOTH, one_row=BOTH,
        ),
    ),
    "rms_norm": (rms_norm, dict(spelling=("F", "torch"), dims=(1, 2), weight=BOTH, one_row=BOTH)),
    "channel_norm": (
        channel_norm,
        dict(kind=("batch", "batch_eval", "instance", "group"), weight=BOTH),
    ),
    "gelu": (gelu, dict(approximate=("none", "tanh"))),
    "silu": (silu, dict(inplace=BOTH)),
    "hardsigmoid": (hardsigmoid, dict(inplace=BOTH)),
    "softmax": (
        softmax,
        dict(spelling=("F", "torch", "Tensor"), dim=(-1, 1, 0), dtype=(None, "float64")),
    ),
    "glu": (glu, {}),
    "normalize": (normalize, dict(p=(2.0, 2.0, 3.0), dim=(-1, 1))),
    "recurrent": (recurrent, dict(kind=("lstm", "gru", "rnn_tanh"), bias=BOTH)),
}  # fmt: skip
