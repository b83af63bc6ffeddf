"""Random calls of the kernels' launchers, in few layouts, so that calls meet plans of others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


class Call:
    """A launcher of the kernels, with operands."""

    def __init__(self, name: str, run: Callable[[], Any], operands: list[Tensor | None]):
        self.name, self.run, self.operands = name, run, operands

    def __str__(self) -> str:
        layouts = [
            None if x is None else (tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % ALIGNMENT)
            for x in self.operands
        ]
        return f"{self.name} {layouts}"


def tensor(layout: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in one of few layouts, so that calls meet the plans of others."""
    kind = layout.choice(["dense"] * 4 + ["offset", "aligned offset", "padded", "one row"])
    if kind == "one row":
        return torch.ones(shape[-1], dtype=dtype).expand(shape)
    last = shape[-1] + (8 if kind == "padded" else 0)
    offset = {"offset": 1, "aligned offset": 8 if dtype.itemsize < 8 else 2}.get(kind, 0)
    memory = torch.ones(torch.Size(shape[:-1]).numel() * last + offset, dtype=dtype)
    return memory[offset:].view(*shape[:-1], last)[..., : shape[-1]]


def present(
    draw: random.Random, layout: random.Random, *shape: int, dtype: torch.dtype
) -> Tensor | None:
    return tensor(layout, shape, dtype) if draw.random() < 0.7 else None


def attention_call(draw: random.Random, layout: random.Random) -> Call:
    """``draw`` chooses everything but the tensors' layouts."""
    from tangent_kernels.attention import run_jvp, run_second_vjp, run_vjp

    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    batch, heads, rows, dim = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 16, 24]), 8
    count = draw.choice([1, 2, 7])
    shape = (batch, heads, rows, dim)
    q, k, v = (tensor(layout, shape, dtype) for _ in range(3))
    mask = mask_t = seed = None
    if draw.random() < 0.4:
        sizes = (draw.choice([1, batch]), draw.choice([1, heads]), rows, draw.choice([1, rows]))
        mask = tensor(layout, sizes, draw.choice([torch.bool, dtype, torch.float32]))
        if mask.is_floating_point():
            mask_t = present(draw, layout, count, *sizes, dtype=mask.dtype)
    if draw.random() < 0.3:
        seed = torch.ones(batch, dtype=torch.int64)
    tangents = [present(draw, layout, count, *shape, dtype=dtype) for _ in range(3)]
    causal = mask is None and draw.random() < 0.3
    options = (draw.choice([0.5, 1.0]), 0.0 if seed is None else 0.25, causal, None)
    operands = [q, k, v, mask, seed, *tangents, mask_t]
    if draw.random() < 0.4:
        return Call("jvp", lambda: run_jvp(tuple(operands), options), operands)
    output, lse = tensor(layout, shape, dtype), torch.ones(shape[:3])
    needs = (*(draw.random() < 0.7 for _ in range(3)), mask_t is not None)
    if draw.random() < 0.5:
        operands = [*operands[:5], output, lse, tensor(layout, (count, *shape), dtype)]
        return Call("vjp", lambda: run_vjp(tuple(operands), options, needs), operands)
    moved = any(x is not None for x in (*tangents[:2], mask_t))
    if all(x is None for x in (*tangents, mask_t)):
        return attention_call(draw, layout)
    mu = torch.ones(count if moved else 0, *shape[:3])
    operands += [output, tensor(layout, (count, *shape), dtype), lse, mu]
    operands += [present(draw, layout, *shape, dtype=dtype), tensor(layout, (count, *shape), dtype)]
    both = (*needs, *(x is not None and draw.random() < 0.7 for x in (*tangents, mask_t)))
    return Call("second", lambda: run_second_vjp(tuple(operands), options, both), operands)


def row_call(draw: random.Random, layout: random.Random) -> Call:
    """``draw`` chooses everything but the tensors' layouts."""
    from tangent_kernels import activation, layer_norm, linear, softmax

    dtype = draw.choice([torch.bfloat16, torch.float32])
    shape, width = (draw.choice([1, 3]), draw.choice([1, 16, 24])), 32

    def rows() -> Tensor:
        return tensor(layout, (*shape, width), dtype)

    def line(size: int = width) -> Tensor | None:
        found = present(draw, layout, size, dtype=dtype)
        return found if found is None else found.contiguous()

    needs = [draw.random() < 0.7 for _ in range(5)]
    kind = draw.choice(
        ["layer", "layer back", "gelu", "gelu back", "softmax", "soft back", "linear"]
    )
    x, x_t, g = rows(), rows(), present(draw, layout, *shape, width, dtype=dtype)
    h = rows()
    statistics = [torch.ones(*shape, 1), torch.ones(*shape, 1)]
    if kind == "layer":
        operands = [x, line(), line(), draw.choice([x_t, None]), line(), line()]
        options = (draw.choice([1e-5, 1e-6]), draw.random() < 0.5)
        return Call(kind, lambda: layer_norm.layer_norm_jvp(*operands, *options), operands)
    if kind == "layer back":
        mean, rstd = statistics
        weight, weight_t = line(), line()
        operands = [x, weight, mean, rstd, x_t, weight_t, g, h]
        return Call(
            kind,
            lambda: layer_norm.layer_norm_second_vjp(
                x, weight, mean, rstd, x_t, weight_t, (g, h), needs[:3], [True, *needs[3:]]
            ),
            operands,
        )
    if kind == "gelu":
        name = draw.choice(activation.ACTIVATIONS)
        return Call(kind, lambda: activation.activation_jvp(x, x_t, name), [x, x_t])
    if kind == "gelu back":
        name = draw.choice(activation.ACTIVATIONS)
        wanted = (needs[0], True)
        operands = [x, x_t, g, h]
        return Call(
            kind, lambda: activation.activation_second_vjp(x, x_t, (g, h), wanted, name), operands
        )
    if kind == "softmax":
        return Call(kind, lambda: softmax.softmax_jvp(x, x_t), [x, x_t])
    if kind == "soft back":
        wanted = (needs[0], True)
        return Call(
            kind, lambda: softmax.softmax_second_vjp(x, x_t, (g, h), wanted), [x, x_t, g, h]
        )
    weight, weight_t = (tensor(layout, (16, width), dtype) for _ in range(2))
    operands = [x, weight, line(16), draw.choice([x_t, None]), weight_t, line(16)]
    return Call(kind, lambda: linear.linear_jvp(*operands), operands)


def gelu(rows: int = 4) -> Call:
    from tangent_kernels.activation import activation_jvp

    x, x_t = torch.ones(rows, 32), torch.ones(rows, 32)
    return Call("gelu", lambda: activation_jvp(x, x_t, "gelu"), [x, x_t])
