"""Random programs: how they grow from a number, end, are judged, and made smaller."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops import fused_forward_ad
from tangent_ops.errors import TangentOpsError
from tests.fuzz.nodes import (
    Env,
    Node,
    case,
    deltas,
    make_model,
    make_models,
    pattern,
    pushed_forward,
    run,
    weighted_sum,
)
from tests.fuzz.ops import OPS, SHAPE

Function = Callable[[Tensor], Tensor]
Grads = tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """The number that it grew from, its precision, what is asked of the tree, and the tree."""

    seed: int
    dtype: torch.dtype
    end: str
    root: Node

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"seed {self.seed}, {dtype}, {self.end} of {self.root!r}"

    @property
    def kinds(self) -> set[str]:
        return {node.kind for node in self.root.nodes()}

    @property
    def changes_in_place(self) -> bool:
        return any(
            n.kind == "in_place" or ("inplace", True) in n.options for n in self.root.nodes()
        )


# How often a node or end is drawn, and how many derivatives of the three allowed it takes.
NODES = {
    "seq": (8, 0),
    "jvp": (6, 1),
    "dual_level": (4, 1),
    "torch_linearize": (2, 1),
    "linearize": (3, 1),
    "vjp": (4, 1),
    "grad": (5, 1),
    "vmap": (5, 0),
    "jacfwd": (2, 1),
    "jacrev": (2, 1),
    "hessian": (2, 2),
    "checkpoint": (3, 0),
    "no_grad": (2, 0),
    "detach": (2, 0),
    "in_place": (4, 0),
    "view": (4, 0),
}
ENDS = {
    "value": (4, 0),
    "gradient": (4, 1),
    "gradient_twice": (2, 2),
    "gradient_by_tangent": (3, 1),
    "gradient_by_tangent_and_input": (3, 2),
    "gradient_in_level": (2, 2),
    "training": (4, 1),
    "training_with_blocks_checkpointed": (2, 1),
    "training_and_gradient": (3, 2),
}
CHOICES = {
    "live": (False, True),
    "in_dim": (0, 1, 2, 3),
    "out_dim": (0, 1, 2, 3),
    "reentrant": (False, False, True),
}
HOW = {"in_place": ("all", "add", "half"), "view": ("transposed", "strided", "expanded", "part")}
TAKES = {
    **dict.fromkeys(("jvp", "dual_level", "torch_linearize", "vjp"), ("live",)),
    "vmap": ("in_dim", "out_dim"),
    "checkpoint": ("reentrant",),
}


FORWARD = {"jvp", "torch_linearize", "linearize", "jacfwd", "hessian", "dual_level"}
REVERSE = {"vjp", "grad", "jacrev", "hessian"}
LEVELS = {"dual_level", *ENDS} - {"value", "gradient", "gradient_twice"}
# What PyTorch refuses, a node inside others or of an end; one program in 20 tries it all the same.
REFUSED: dict[str, set[str]] = {
    **dict.fromkeys(FORWARD, LEVELS),
    "dual_level": FORWARD | LEVELS | {"vmap"},
    "checkpoint": REVERSE | {"vmap"},
    "recurrent": {"vmap", "jacfwd", "jacrev", "hessian"},
}
# Its function is a constant of x.
NOT_DIFFERENTIABLE = {"torch_linearize": FORWARD | REVERSE | {*ENDS} - {"value"}}
REENTRANT_REFUSED = FORWARD | {end for end in ENDS if end.startswith("gradient_")}


def grow(seed: int) -> Program:
    """The program of this number."""
    draw = Random(seed)
    end = draw.choices(list(ENDS), [weight for weight, _ in ENDS.values()])[0]
    double, single = torch.float64, torch.float32
    dtype, cast = draw.choice([*[(double, False)] * 4, (single, False), (single, True)])
    around = {end, "careless"} if draw.random() < 0.05 else {end}
    root = _tree(draw, draw.randint(1, 6), 3 - ENDS[end][1], around)
    return Program(seed, dtype, end, Node("autocast", (), (root,)) if cast else root)


def _tree(draw: Random, size: int, orders: int, around: Set[str]) -> Node:
    """``around``: kinds of the nodes around this one, and the end."""
    if size <= 1:
        return _op(draw, around)
    fitting = [kind for kind, (_, order) in NODES.items() if order <= orders and _may(kind, around)]
    kind = draw.choices(fitting, [NODES[name][0] for name in fitting])[0]
    orders -= NODES[kind][1]
    inside = around | {kind}
    if kind == "seq":
        first = draw.randint(1, size - 1)
        sizes = (first, size - first)
        return Node(kind, (), tuple(_tree(draw, each, orders, inside) for each in sizes))
    options = {name: draw.choice(CHOICES[name]) for name in TAKES.get(kind, ())}
    if kind in HOW:
        options["how"] = draw.choice(HOW[kind])
    if kind == "checkpoint" and around & REENTRANT_REFUSED:
        options["reentrant"] = False
    # In place: what an op returned, as a view may be the input itself.
    child = _op(draw, inside) if kind == "in_place" else _tree(draw, size - 1, orders, inside)
    return Node(kind, tuple(options.items()), (child,))


def _may(kind: str, around: Set[str]) -> bool:
    if around & NOT_DIFFERENTIABLE.get(kind, set()):
        return False
    return "careless" in around or not around & REFUSED.get(kind, set())


def _op(draw: Random, around: Set[str]) -> Node:
    name = draw.choice([name for name in OPS if _may(name, around)])
    options = tuple((key, draw.choice(values)) for key, values in OPS[name][1].items())
    count = 1 + len(case(Node(name, options)).shapes)
    live = tuple(draw.random() < 0.7 for _ in range(count))
    return Node(name, (*options, ("live", live if any(live) else (True,) * count)))


def start(program: Program, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(program.seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(program.dtype).to(dtype)


def outputs(program: Program, env: Env, fast: bool = False) -> Tensor:
    """All that the program computes, one after the other.

    Args:
        program: to run.
        env: how.
        fast: PyTorch's own attention is what PyTorch chooses, not MATH.
    """
    dtype = torch.float64 if env.exact else program.dtype
    x, training = start(program, dtype), program.end.startswith("training")
    within = contextlib.nullcontext()
    if env.mode == "ours" and not training:  # a linearized model needs no context
        within = fused_forward_ad()
    elif env.mode == "plain" and not fast:
        within = sdpa_kernel(SDPBackend.MATH)
    with warnings.catch_warnings(), within:
        warnings.simplefilter("ignore")  # missing batching rules, checkpoints of constants
        make_models(env, dtype, program.root)
        if training:
            found = _training(program, env, x)
        else:
            tree = lambda x: run(program.root, env, x)  # noqa: E731
            found = (_by_torch_func if env.exact else _by_autograd)(program.end, tree, x)
    return torch.cat([part.detach().double().flatten() for part in found])


def _by_autograd(end: str, f: Function, x: Tensor) -> Grads:
    if end == "value":
        return (f(x),)
    x_t = pattern(x.shape, x, 5.0)
    if end.startswith("gradient_by_tangent"):
        x.requires_grad_(end.endswith("input"))
        x_t.requires_grad_()
        with forward_ad.dual_level():
            y, y_t = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x_t)))
        y_t = torch.zeros_like(y) if y_t is None else y_t
        return y, y_t, *_gradients(weighted_sum(y_t, 1.5), [x, x_t] if x.requires_grad else [x_t])
    x.requires_grad_()
    if end == "gradient_in_level":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x_t)
            (grad,) = torch.autograd.grad(weighted_sum(f(dual)), dual)
            grad, grad_t = forward_ad.unpack_dual(grad)
            return grad, torch.zeros_like(grad) if grad_t is None else grad_t
    y = f(x)
    loss = weighted_sum(y)
    if end == "gradient":
        return y, *_gradients(loss, [x])
    if not loss.requires_grad:
        return y, torch.zeros_like(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True, materialize_grads=True)
    return y, *_gradients(weighted_sum(grad, 1.5), [x])


def _gradients(loss: Tensor, leaves: list[Tensor]) -> Grads:
    if loss.requires_grad:
        loss.backward()
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)


def _by_torch_func(end: str, f: Function, x: Tensor) -> Grads:
    if end == "value":
        return (f(x),)
    jvp, grad, x_t = torch.func.jvp, torch.func.grad, pattern(x.shape, x, 5.0)
    by_x = grad(lambda x: weighted_sum(f(x)))
    if end == "gradient":
        return f(x), by_x(x)
    if end == "gradient_in_level":
        return jvp(by_x, (x,), (x_t,))
    if end == "gradient_twice":
        return f(x), grad(lambda x: weighted_sum(by_x(x), 1.5))(x)
    both = grad(lambda x, x_t: weighted_sum(jvp(f, (x,), (x_t,))[1], 1.5), (0, 1))(x, x_t)
    return *jvp(f, (x,), (x_t,)), *both[0 if end.endswith("input") else 1 :]


def _training(program: Program, env: Env, x: Tensor) -> Grads:
    """Output of a linearized model of one block or two, and gradients by deltas (and input)."""
    root = program.root
    model = make_model(env, x.dtype, *(root.children if root.kind == "seq" else [root]))
    by_input = program.end.endswith("gradient")
    if env.mode == "ours":
        if program.end.endswith("checkpointed"):
            model.set_grad_checkpointing()
        y = model(x.requires_grad_(by_input))
        leaves = list(model.deltas().values())
        return y, *_gradients(weighted_sum(y), leaves + [x] * by_input)

    def loss(directions, x):
        y, y_t = pushed_forward(model, x, directions)
        return weighted_sum(y + y_t), y + y_t

    by, y = torch.func.grad(loss, (0, 1), has_aux=True)(deltas(model), x)
    return y, *by[0].values(), *[by[1]] * by_input


OUTCOMES = (
    "right",
    "refused by us",
    "refused by PyTorch",
    "raised, PyTorch otherwise",  # with another type of error
    "raised",
    "wrong",
)
FAILURES = OUTCOMES[-2:]


def outcome(program: Program) -> tuple[str, str]:
    """One of ``OUTCOMES``, and what was seen."""
    try:
        found = outputs(program, Env("ours"))
    except TangentOpsError as error:
        return "refused by us", _words(error)
    except Exception as error:
        return _raised(program, error)
    exact = outputs(program, Env("exact"))
    assert exact.isfinite().all()
    error = float((found - exact).abs().max())
    allowed = roundings(program) * max(1.0, float(exact.abs().max()))
    if not error <= allowed:
        h = 2.0**-30
        change = float((outputs(program, Env("exact", h)) - exact).abs().max()) / h
        allowed = max(allowed, roundings(program) * change)
    if error <= allowed:  # a NaN is not
        return "right", f"{error:.1e} off, {allowed:.1e} allowed"
    return (
        "wrong",
        f"{error:.1e} off, {allowed:.1e} allowed, largest {float(exact.abs().max()):.1e}",
    )


def roundings(program: Program) -> float:
    """What a program may err, in outputs of ops: a thousand roundings, as a third derivative sums
    hundreds of products; under autocast products are summed in float32, and few are rounded.
    PyTorch's hardsigmoid multiplies by a sixth in float32, in float64 too."""
    if "autocast" in program.kinds:
        return 16 * torch.finfo(torch.bfloat16).eps
    sixth = torch.finfo(torch.float32).eps if "hardsigmoid" in program.kinds else 0.0
    return max(1000 * torch.finfo(program.dtype).eps, sixth)


def _raised(program: Program, error: Exception) -> tuple[str, str]:
    """PyTorch's own refusal, if PyTorch alone raises too.

    A change in place where the program makes none is no refusal. That its fast attention has one
    derivative in reverse mode is: a call without a tangent is PyTorch's own.
    """
    if "inplace operation" in str(error) and not program.changes_in_place:
        return "raised", _words(error)
    fast = "derivative for aten::_scaled_dot_product" in str(error)
    try:
        outputs(program, Env("plain"), fast)
    except Exception as other:
        same = type(other) is type(error)
        how = "refused by PyTorch" if same else "raised, PyTorch otherwise"
        return how, f"{_words(error)} / {_words(other)}"
    return "raised", _words(error)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


def smallest(program: Program) -> Program:
    """The program with nodes taken out while it fails in the same way."""
    how = outcome(program)[0]
    smaller = True
    while smaller:
        smaller = False
        for root in _without_one(program.root):
            one = replace(program, root=root)
            with contextlib.suppress(Exception):
                if outcome(one)[0] == how:
                    program, smaller = one, True
                    break
    return program


def _without_one(node: Node) -> Iterator[Node]:
    yield from node.children
    for i, child in enumerate(node.children):
        for less in _without_one(child):
            yield replace(node, children=(*node.children[:i], less, *node.children[i + 1 :]))
