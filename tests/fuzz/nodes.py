"""Trees of ops and transforms, and the three ways to run them.

Each node is a map of a tensor of ``ops.SHAPE`` to another one, so everything nests in everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.fuzz.ops import OPS, Case


@dataclass(frozen=True)
class Node:
    """What is done, with which options, to the maps that the children are."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    children: tuple[Node, ...] = ()

    def __repr__(self) -> str:
        parts = [*map(repr, self.children), *(f"{k}={v!r}" for k, v in self.options)]
        return f"{self.kind}({', '.join(parts)})"

    def nodes(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.nodes()


@dataclass
class Env:
    """How a program runs.

    Attributes:
        mode: "ours", this library; "plain", PyTorch alone; "exact", float64 and elementary
            operations, with no checkpoint, autocast, dual_level or change in place.
        noise: "exact" alone: operands and outputs of ops change by this, relatively.
        rounded: how many outputs did.
        no_grad_is_constant: to forward mode, too.
        models: what stands for a "linearize".
    """

    mode: Literal["ours", "plain", "exact"]
    noise: float = 0.0
    rounded: int = 0
    no_grad_is_constant: bool = False
    models: dict[Node, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.mode == "exact"

    def rounding(self, x: Tensor) -> Tensor:
        """x with noise on its value, and other noise on its derivatives."""
        self.rounded += 2
        if not self.noise:
            return x
        one, two = (pattern(x.shape, x, 7.0 * self.rounded + i).sign() for i in range(2))
        return x + self.noise * (one * x + two * (x - x.detach()))


def pattern(shape: Any, like: Tensor, phase: float) -> Tensor:
    """Fixed numbers in [-1, 1] that look like nothing in particular."""
    angle = 2.3 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + phase
    return angle.sin().reshape(shape).to(like.dtype)


def drawn_from(x: Tensor, shape: Any, phase: float, live: bool) -> Tensor:
    """Fixed numbers; if ``live``, numbers that move with x."""
    fixed = pattern(shape, x, phase)
    if not live:
        return fixed
    count = fixed.numel()
    return fixed + 0.3 * x.reshape(-1).repeat(1 + count // x.numel())[:count].reshape(shape)


def weighted_sum(y: Tensor, phase: float = 0.5) -> Tensor:
    return (y * pattern(y.shape, y, phase)).sum()


def case(node: Node) -> Case:
    options = {name: value for name, value in node.options if name != "live"}
    return OPS[node.kind][0](**options)


def run(node: Node, env: Env, x: Tensor) -> Tensor:
    if node.kind in OPS:
        return _run_op(node, env, x)
    maps = [functools.partial(run, child, env) for child in node.children]
    y = KINDS[node.kind](env, node, *maps, x, **dict(node.options))
    # Derivatives of derivatives would soon be so large that nothing but rounding is left of them.
    return y / (1 + y * y / 16).sqrt() if node.kind in GROWING else y


def _run_op(node: Node, env: Env, x: Tensor) -> Tensor:
    what, live = case(node), dict(node.options)["live"]
    operands = [
        env.rounding(drawn_from(x, shape, 1.0 + i, moves))
        for i, (shape, moves) in enumerate(zip(what.shapes, live[1:], strict=True))
    ]
    given = x if live[0] else pattern(x.shape, x, 4.0)
    if env.exact:
        return env.rounding(what.exact(env.rounding(given), *operands))
    call = what.plain if env.mode == "plain" and what.plain else what.call
    return call(given, *operands)


# Nodes with children: (env, node, *maps, x, **options) -> tensor.


def _seq(env, node, f, g, x):
    return g(f(x))


def _jvp(env, node, f, x, live):
    y, y_t = torch.func.jvp(f, (x,), (drawn_from(x, x.shape, 2.0, live),))
    return 0.5 * y + y_t


def _dual_level(env, node, f, x, live):
    if env.exact:
        return _jvp(env, node, f, x, live)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, drawn_from(x, x.shape, 2.0, live))
        y, y_t = forward_ad.unpack_dual(f(dual))
    return 0.5 * y if y_t is None else 0.5 * y + y_t


def _torch_linearize(env, node, f, x, live):
    direction = drawn_from(x, x.shape, 2.0, live)
    if env.exact:
        return _jvp(env, node, f, x, live)
    y, push_forward = torch.func.linearize(f, x)
    return 0.5 * y + push_forward(direction)


def _vjp(env, node, f, x, live):
    y, pull_back = torch.func.vjp(f, x)
    return 0.5 * y + pull_back(drawn_from(x, x.shape, 3.0, live))[0]


def _grad(env, node, f, x):
    return torch.func.grad(lambda x: weighted_sum(f(x)))(x)


def _vmap(env, node, f, x, in_dim, out_dim):
    stack = torch.stack([x, x * pattern(x.shape, x, 2.0)], in_dim)
    first, second = torch.func.vmap(f, in_dim, out_dim)(stack).unbind(out_dim)
    return first + 0.5 * second


def _along_two_directions(f, x):
    """f as a function of two coefficients, and where: few enough for a whole Jacobian."""
    return lambda c: f(c[0] * x + c[1] * pattern(x.shape, x, 3.0)), pattern((2,), x, 0.5)


def _jacfwd(env, node, f, x):
    h, where = _along_two_directions(f, x)
    first, second = torch.func.jacfwd(h)(where).unbind(-1)
    return first + 0.5 * second


def _jacrev(env, node, f, x):
    h, where = _along_two_directions(f, x)

    def two_sums(c):
        y = h(c)
        return torch.stack([weighted_sum(y), weighted_sum(y, 1.5)])

    return x * weighted_sum(torch.func.jacrev(two_sums)(where))


def _hessian(env, node, f, x):
    h, where = _along_two_directions(f, x)
    return x * weighted_sum(torch.func.hessian(lambda c: weighted_sum(h(c)))(where))


def repeated(env, f, x, reentrant):
    return f(x) if env.exact else checkpoint(f, x, use_reentrant=reentrant)


def _checkpoint(env, node, f, x, reentrant):
    return repeated(env, f, x, reentrant)


def _no_grad(env, node, f, x):
    if env.no_grad_is_constant:
        return _detach(env, node, f, x)
    with torch.no_grad():
        y = f(x)
    return x * y


def _detach(env, node, f, x):
    return x * f(x).detach()


def _autocast(env, node, f, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=not env.exact):
        return f(x).to(x.dtype)


def _in_place(env, node, f, x, how):
    y = f(x)
    if env.exact:
        if how == "add":
            return y + x
        return torch.cat([0.7 * y[..., :4], y[..., 4:]], -1) if how == "half" else 0.7 * y
    if how == "add":
        y += x
    elif how == "half":
        y[..., :4] *= 0.7
    else:
        y.transpose(0, 1).mul_(0.7)
    return y


def _view(env, node, f, x, how):
    if how == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "strided":
        x = torch.stack([x, 2 * x], -1)[..., 0]
    elif how == "expanded":
        x = x[:, :1].expand(x.shape)
    elif how == "part":
        x = torch.cat([x, x], 1)[:, 2:5]
    return f(x.contiguous() if env.exact else x)


def _linearize(env, node, f, x):
    """This library's, of a module around f."""
    return env.models[node](x)


KINDS: dict[str, Callable[..., Tensor]] = {
    "seq": _seq,
    "jvp": _jvp,
    "dual_level": _dual_level,
    "torch_linearize": _torch_linearize,
    "vjp": _vjp,
    "grad": _grad,
    "vmap": _vmap,
    "jacfwd": _jacfwd,
    "jacrev": _jacrev,
    "hessian": _hessian,
    "linearize": _linearize,
    "checkpoint": _checkpoint,
    "no_grad": _no_grad,
    "detach": _detach,
    "autocast": _autocast,
    "in_place": _in_place,
    "view": _view,
}
SAME_SIZE = {"seq", "linearize", "checkpoint", "autocast", "in_place", "view"}
GROWING = KINDS.keys() - SAME_SIZE
