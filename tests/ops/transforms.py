"""PyTorch's transforms as functions T(f) -> g of one tensor, so that any nesting can be written.

A *cell* names a nesting from the outside in: ``("grad", "jvp")`` is grad(jvp(attention)). Weights,
directions and cotangents depend on shapes alone, so a cell has one value, in any precision.

:func:`outcome` compares that value with the same nesting of PyTorch's MATH attention in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointError, checkpoint

from tangent_ops.errors import UnsupportedError
from tests.ops import oracle

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]
Cell = tuple[str, ...]

SHAPE = (3, 1, 2, 3, 16)  # query, key and value of one image, two heads, three tokens


def pattern(shape: torch.Size | tuple[int, ...], like: Tensor, phase: float) -> Tensor:
    """Fixed numbers in [-1, 1] without a visible order."""
    count = torch.Size(shape).numel()
    angle = 2.3 * torch.arange(count, dtype=torch.float64, device=like.device) + phase
    return angle.sin().reshape(shape).to(like.dtype)


def weighted_sum(y: Tensor, like: Tensor, phase: float = 0.5) -> Tensor:
    return (y.to(like.dtype) * pattern(y.shape, like, phase)).sum()


def jvp(f: Function) -> Function:
    return lambda x: torch.stack(torch.func.jvp(f, (x,), (pattern(x.shape, x, 1.0),)))


def vjp(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        y, pull_back = torch.func.vjp(f, x)
        return pull_back(pattern(y.shape, y, 0.5))[0]

    return g


def grad(f: Function) -> Function:
    return torch.func.grad(lambda x: weighted_sum(f(x), x))


def vmap(f: Function) -> Function:
    return lambda x: torch.func.vmap(f)(torch.stack([x, x * pattern(x.shape, x, 2.0)]))


def along_two_directions(f: Function, x: Tensor) -> tuple[Function, Tensor]:
    """f as a function of two coefficients, and where: few enough for a whole Jacobian."""
    direction = pattern(x.shape, x, 3.0)
    return lambda c: f(c[0] * x + c[1] * direction), pattern((2,), x, 0.5)


def jacfwd(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        h, where = along_two_directions(f, x)
        return torch.func.jacfwd(h)(where)

    return g


def jacrev(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        h, where = along_two_directions(f, x)

        def two_sums(c: Tensor) -> Tensor:
            y = h(c)
            return torch.stack([weighted_sum(y, c), weighted_sum(y, c, 1.5)])

        return torch.func.jacrev(two_sums)(where)

    return g


def hessian(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        h, where = along_two_directions(f, x)
        return torch.func.hessian(lambda c: weighted_sum(h(c), c))(where)

    return g


def linearize(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        y, f_jvp = torch.func.linearize(f, x)
        f_jvp(pattern(x.shape, x, 2.0))  # a first call must leave the second one right
        return torch.stack([y, f_jvp(pattern(x.shape, x, 1.0))])

    return g


def dual_level(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            y, y_t = forward_ad.unpack_dual(f(forward_ad.make_dual(x, pattern(x.shape, x, 1.0))))
            return torch.stack([y, torch.zeros_like(y) if y_t is None else y_t])

    return g


def checkpointed(f: Function) -> Function:
    return lambda x: checkpoint(f, x, use_reentrant=False)  # pyright: ignore


def autocast(f: Function) -> Function:
    def g(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return f(x)

    return g


def compiled(f: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "jvp": jvp,
    "vjp": vjp,
    "grad": grad,
    "vmap": vmap,
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "hessian": hessian,
    "linearize": linearize,
    "dual_level": dual_level,
    "checkpoint": checkpointed,
    "autocast": autocast,
    "compile": compiled,
}
DEEP = ("jvp", "grad", "vmap")  # nested three deep, too
TRIPLES: list[Cell] = [*itertools.product(DEEP, repeat=3), ("jacrev", "jacfwd", "jvp")]
CELLS: list[Cell] = [
    (),
    *((name,) for name in TRANSFORMS),
    *itertools.product(TRANSFORMS, repeat=2),
    *TRIPLES,
]


def title(cell: Cell) -> str:
    return "-of-".join(cell) or "plain"


def value(cell: Cell, op: Op, x: Tensor, backward: bool = False) -> Tensor:
    """What the nesting computes of ``op``.

    Args:
        cell: names of transforms, outermost first.
        op: attention of query, key and value.
        x: the three of them, stacked.
        backward: append the gradient of a weighted sum of the value, taken by a backward pass
            after all else: what a checkpoint recomputes for.
    """

    def f(x: Tensor) -> Tensor:
        query, key, value = x.unbind()
        return op(query, key, value)

    for name in reversed(cell):
        f = TRANSFORMS[name](f)
    if not backward:
        return f(x)
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (gradient,) = torch.autograd.grad(weighted_sum(y, leaf), leaf)
    return torch.cat([y.detach().to(x.dtype).flatten(), gradient.flatten()])


def plain_cell(cell: Cell) -> Cell:
    """The same mathematics by torch.func's eager transforms alone.

    A dual_level, and linearize which enters one, becomes a jvp: levels do not nest, and the
    backward of a softmax in one is wrong in PyTorch itself (it raises; around it, a checkpoint
    computes wrong numbers in silence).
    """
    changes_nothing = ("checkpoint", "autocast", "compile")
    return tuple(
        "jvp" if name in ("dual_level", "linearize") else name
        for name in cell
        if name not in changes_nothing
    )


class Reason(NamedTuple):
    """Why a cell may raise: the error's type, a part of its message, and words for the docs."""

    error: type[Exception]
    says: str
    means: str


# In order: the first that fits an error, or one of its causes, names it.
REASONS = {
    "kernels": Reason(
        UnsupportedError,
        "",
        "The Triton kernels do not compute this derivative. Pass `backend='reference'`, which "
        "does.",
    ),
    "fast": Reason(
        RuntimeError,
        "_scaled_dot_product_",
        "Where nothing seems dual the default is PyTorch's own attention, whose fast versions have "
        "a first derivative in reverse mode and no other. Pass `backend='reference'`.",
    ),
    "levels": Reason(
        RuntimeError,
        "Nested forward mode AD",
        "PyTorch allows no other forward mode around or inside a `dual_level`. Use "
        "`torch.func.jvp` for both.",
    ),
    "recompute": Reason(
        CheckpointError,
        "",
        "The backward pass recomputes the checkpoint after its forward-mode level is left, "
        "without tangents. Put the checkpoint around the level, `checkpoint(jvp(f))`, and "
        "`fused_forward_ad()` inside it: a backward pass runs without the context that it is "
        "called in.",
    ),
    "hooks": Reason(
        RuntimeError,
        "saved tensor hooks",
        "A checkpoint hooks into saved tensors, and torch.func's reverse mode allows no hooks. Use "
        "`torch.autograd.grad` or `backward()` around the checkpoint.",
    ),
    "batch": Reason(
        RuntimeError,
        "aten::_make_dual",
        "PyTorch cannot make a tensor dual within vmap. Use `vmap(jvp(f))`, or a `dual_level` "
        "around the vmap.",
    ),
    "unbatched": Reason(
        RuntimeError,
        "maybe_level.has_value()",
        "The backward pass recomputes the checkpoint after vmap is left (PyTorch reports an "
        "internal assertion). Put the checkpoint around the vmap.",
    ),
    "fx": Reason(
        RuntimeError,
        "FX to symbolically trace a dynamo-optimized function",
        "`torch.func.linearize` traces, and traces no compiled function. Compile nothing inside.",
    ),
    "dynamo": Reason(
        Unsupported,
        "",
        "Dynamo does not trace this. A compiled function cannot be transformed from outside: "
        "compile the whole, `torch.compile(jvp(f))`; and where that raises too, run it eagerly.",
    ),
}


def reason(error: BaseException) -> str:
    """The name of why ``error`` was raised, or its type where it names no reason."""

    def causes(error: BaseException | None) -> Iterator[BaseException]:
        while error is not None:
            yield error
            error = error.__cause__ or error.__context__

    for name, known in REASONS.items():
        if any(isinstance(e, known.error) and known.says in str(e) for e in causes(error)):
            return name
    return type(error).__name__


@functools.cache
def linearize_is_wrong(cell: Cell) -> bool:
    """Whether ``torch.func.linearize`` is wrong, in silence, of elementwise functions too."""

    def elementwise(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query * key).sin() * value

    x = pattern(SHAPE, torch.empty((), dtype=torch.float64), 0.1)
    backward = "checkpoint" in cell
    try:
        found = value(cell, elementwise, x, backward)
    except Exception:
        return False
    exact = value(plain_cell(cell), elementwise, x, backward)
    return not torch.allclose(found.to(exact.dtype), exact, rtol=0.05, atol=0.05)


def outcome(cell: Cell, op: Op, dtype: torch.dtype = torch.float64, device: str = "cpu") -> str:
    """ "right", "raises NAME" or "wrong ERROR" (relative to the largest entry).

    And "pytorch" where PyTorch's ``linearize`` is wrong whatever function it is given.

    Right is: within a thousand roundings, since a fourth derivative sums hundreds of products.
    Under autocast: at most twice as wrong as MATH with autocast around the plain cell, plus one
    rounding to bfloat16.

    Args:
        cell: names of transforms, outermost first.
        op: attention under test.
        dtype: of the inputs; float32 where the cell has autocast, which leaves float64 alone.
        device: of the inputs.
    """
    if "linearize" in cell and linearize_is_wrong(cell):
        return "pytorch"
    generator = torch.Generator().manual_seed(0)
    exact_x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(device)
    x = exact_x.to(torch.float32 if "autocast" in cell else dtype)
    backward = "checkpoint" in cell
    try:
        found = value(cell, op, x, backward)
    except Exception as error:
        return f"raises {reason(error)}"

    exact = value(plain_cell(cell), oracle.math_attention, exact_x, backward)
    size = exact.abs().max()
    allowed = 1000 * torch.finfo(x.dtype).eps
    if "autocast" in cell:
        cast_outside = ("autocast", *plain_cell(cell))
        eager = value(cast_outside, oracle.math_attention, x, backward)
        allowed = 2 * float((eager - exact).abs().max() / size) + torch.finfo(torch.bfloat16).eps
    assert found.shape == exact.shape
    error = float((found - exact).abs().max() / size)
    return "right" if error <= allowed else f"wrong {error:.0e}"  # a NaN is wrong
