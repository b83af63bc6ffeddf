"""The single layers of the suite: as PyTorch writes them, and spelled out for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline import linear_cost, row_cost
from benchmarks.suite.case import Cost

Tensors = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]  # output and tangent
Normal = Callable[..., Tensor]  # standard normal numbers of a shape

EPS = 1e-5
INV_SQRT_2, INV_SQRT_TAU = 2**-0.5, (2 * torch.pi) ** -0.5


@dataclass(frozen=True)
class Layer:
    """A layer of inputs (rows, width) and parameters, to one output.

    Attributes:
        plain: of its operands, by PyTorch's functions.
        formula: output and tangent of operands and tangents, as one would write them.
        draw: operands of (rows, width, *outer), by a source of random numbers.
        cost: of a question, rows, width, *outer and the bytes of an element.
    """

    plain: Callable[..., Tensor]
    formula: Callable[[Tensors, Tensors], Pair]
    draw: Callable[..., Tensors]
    cost: Callable[..., Cost]


# --- as PyTorch writes them ------------------------------------------------------------------


def layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias, EPS)


def rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(input, weight.shape, weight, EPS)


def softmax(input: Tensor) -> Tensor:
    return F.softmax(input, -1)


# --- spelled out, in float32 -----------------------------------------------------------------


def _float(tensors: Tensors) -> Tensors:
    return tuple(tensor.float() for tensor in tensors)


def layer_norm_formula(primals: Tensors, tangents: Tensors) -> Pair:
    """Statistics in float32, as PyTorch takes them."""
    dtype = primals[0].dtype
    (x, weight, bias), (x_t, weight_t, bias_t) = _float(primals), _float(tangents)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed = centred * rstd
    moved = x_t - x_t.mean(-1, keepdim=True) - normed * (normed * x_t).mean(-1, keepdim=True)
    output = weight * normed + bias
    output_t = weight * rstd * moved + weight_t * normed + bias_t
    return output.to(dtype), output_t.to(dtype)


def rms_norm_formula(primals: Tensors, tangents: Tensors) -> Pair:
    dtype = primals[0].dtype
    (x, weight), (x_t, weight_t) = _float(primals), _float(tangents)
    rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed = x * rstd
    moved = rstd * (x_t - normed * (normed * x_t).mean(-1, keepdim=True))
    return (weight * normed).to(dtype), (weight * moved + weight_t * normed).to(dtype)


def gelu_formula(primals: Tensors, tangents: Tensors) -> Pair:
    dtype = primals[0].dtype
    (x,), (x_t,) = _float(primals), _float(tangents)
    below = (1 + torch.erf(x * INV_SQRT_2)) / 2
    density = torch.exp(-x.square() / 2) * INV_SQRT_TAU
    return (x * below).to(dtype), ((below + x * density) * x_t).to(dtype)


def silu_formula(primals: Tensors, tangents: Tensors) -> Pair:
    dtype = primals[0].dtype
    (x,), (x_t,) = _float(primals), _float(tangents)
    sigmoid = torch.sigmoid(x)
    return (x * sigmoid).to(dtype), (sigmoid * (1 + x * (1 - sigmoid)) * x_t).to(dtype)


def softmax_formula(primals: Tensors, tangents: Tensors) -> Pair:
    dtype = primals[0].dtype
    (x,), (x_t,) = _float(primals), _float(tangents)
    output = torch.softmax(x, -1)
    output_t = output * (x_t - (output * x_t).sum(-1, keepdim=True))
    return output.to(dtype), output_t.to(dtype)


def linear_formula(primals: Tensors, tangents: Tensors) -> Pair:
    (x, weight, bias), (x_t, weight_t, bias_t) = primals, tangents
    return F.linear(x, weight, bias), F.linear(x_t, weight, bias_t) + F.linear(x, weight_t)


# --- operands --------------------------------------------------------------------------------


def _of_input(normal: Normal, rows: int, width: int) -> Tensors:
    return (normal(rows, width),)


def _of_norm(bias: bool) -> Callable[..., Tensors]:
    def draw(normal: Normal, rows: int, width: int) -> Tensors:
        parameters = (1 + 0.1 * normal(width), normal(width))
        return normal(rows, width), *parameters[: 1 + bias]

    return draw


def _of_linear(normal: Normal, rows: int, inner: int, outer: int) -> Tensors:
    return normal(rows, inner), inner**-0.5 * normal(outer, inner), normal(outer)


def _rows(name: str, plain, formula, draw) -> Layer:
    return Layer(plain, formula, draw, partial(row_cost, name))


LAYERS = {
    "layer_norm": _rows("layer_norm", layer_norm, layer_norm_formula, _of_norm(True)),
    "rms_norm": _rows("rms_norm", rms_norm, rms_norm_formula, _of_norm(False)),
    "gelu": _rows("gelu", F.gelu, gelu_formula, _of_input),
    "silu": _rows("silu", F.silu, silu_formula, _of_input),
    "softmax": _rows("softmax", softmax, softmax_formula, _of_input),
    "linear": Layer(F.linear, linear_formula, _of_linear, linear_cost),
}
