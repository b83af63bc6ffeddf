"""Whether a program is computed right, and what is left of one that is not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops import fused_forward_ad
from tangent_ops.errors import TangentOpsError
from tests.fuzz.grow import Program
from tests.fuzz.models import deltas, make_model, make_models, pushed_forward
from tests.fuzz.nodes import Env, Node, pattern, run, weighted_sum
from tests.fuzz.ops import SHAPE, seen_scores

Function = Callable[[Tensor], Tensor]
Grads = tuple[Tensor, ...]
OUTCOMES = (
    "right",
    "refused by us",
    "refused by PyTorch",
    "wrong in PyTorch too",  # in reverse mode alone, which is PyTorch's own here
    "raised, PyTorch otherwise",  # with another type of error
    "raised",
    "wrong",
)
FAILURES = OUTCOMES[-2:]


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


class Outcome(NamedTuple):
    """One of ``OUTCOMES``, what was seen, and how far a wrong result is off."""

    how: str
    seen: str
    error: float = 0.0


def outcome(program: Program) -> Outcome:
    """Run the program, and the same in float64 by elementary operations."""
    try:
        found = outputs(program, Env("ours"))
    except TangentOpsError as error:
        return Outcome("refused by us", _words(error))
    except Exception as error:
        return _raised(program, error)
    seen_scores.clear()
    exact = outputs(program, Env("exact"))
    scores = max(seen_scores, default=0.0)
    assert exact.isfinite().all(), f"no oracle: {program}"
    error, size = _far(found, exact), float(exact.abs().max())
    allowed = roundings(program) * max(1.0, size)
    if error > allowed:
        h, least = 2.0**-30, 2.0**-50
        change = _far(outputs(program, Env("exact", h)), exact) / h
        oracle = 1000 * _far(outputs(program, Env("exact", least)), exact)  # may err as well
        allowed = max(allowed, roundings(program) * change, oracle)
    if error > allowed and ("autocast" in program.kinds or error == float("inf")):
        with contextlib.suppress(Exception):
            by_pytorch = _far(outputs(program, Env("plain")), exact)
            if by_pytorch == float("inf"):
                return Outcome("refused by PyTorch", "NaN")
            allowed = max(allowed, 2 * by_pytorch)
    if error > allowed and program.dtype == torch.float32:
        ill = error > 1e6 or allowed > 100 * roundings(program) * max(1.0, size)
        in_float64 = outcome(replace(program, dtype=torch.float64))
        if ill or error <= 2.0**29 * in_float64.error:  # the ratio of the types' roundings
            return in_float64
    # exp of a score errs by eps times the score, and second derivatives multiply that by two more.
    if error > allowed and torch.finfo(torch.float64).eps * scores**3 > 1e-3:
        return Outcome("right", f"no digits are left with scores up to {scores:.0e}")
    if error > allowed and _is_reverse_alone(program):
        with contextlib.suppress(Exception):
            if _far(outputs(program, Env("plain")), found) <= allowed:
                return Outcome("wrong in PyTorch too", "")
    seen = f"{error:.1e} off, {allowed:.1e} allowed, largest {size:.1e}"
    return Outcome("right" if error <= allowed else "wrong", seen, error)


def _is_reverse_alone(program: Program) -> bool:
    forward = {"jvp", "jacfwd", "hessian", "linearize", "torch_linearize", "dual_level"}
    return program.end in ("value", "gradient", "gradient_twice") and not forward & program.kinds


def _far(found: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite if it is NaN."""
    return float((found - exact).abs().max().nan_to_num(nan=float("inf")))


def roundings(program: Program) -> float:
    """What a program may err, relative to what its result changes as operands and outputs do.

    A thousand roundings, as a third derivative sums hundreds of products; of float64 thousands of
    times more, as a saturated softmax's tangent is the difference of such numbers (and PyTorch's
    hardsigmoid multiplies by a sixth in float32). Under autocast products are summed in float32,
    and few are rounded; what PyTorch alone errs there is allowed twice, too.
    """
    if "autocast" in program.kinds:
        return 16 * torch.finfo(torch.bfloat16).eps
    if program.dtype == torch.float32:
        return 1000 * torch.finfo(torch.float32).eps
    return torch.finfo(torch.float32).eps if "hardsigmoid" in program.kinds else 1e-9


def _raised(program: Program, error: Exception) -> Outcome:
    """PyTorch's own refusal, if PyTorch alone raises too.

    A change in place where the program makes none is no refusal. That PyTorch's fast attention has
    one derivative in reverse mode, or keeps its output, is: a call without a tangent is PyTorch's
    own, and so is the repeated pass of a checkpointed block.
    """
    words = _words(error)
    if "inplace operation" in words and not program.changes_in_place:
        return Outcome("raised", words)
    fast = "_scaled_dot_product_" in words and "forward AD" not in words
    if "inplace operation" in words:  # its fast attention's output, which it keeps
        fast = program.end.endswith("checkpointed") or not program.end.startswith("training")
    for chosen in (False, True)[: 1 + fast]:
        try:
            outputs(program, Env("plain"), chosen)
        except Exception as other:
            same = type(other) is type(error)
            how = "refused by PyTorch" if same else "raised, PyTorch otherwise"
            return Outcome(how, f"{words} / {_words(other)}")
    return Outcome("raised", words)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


def smallest(program: Program) -> Program:
    """The program with nodes taken out while it fails in the same way, and as badly."""
    how, _, error = outcome(program)
    smaller = True
    while smaller:
        smaller = False
        for root in _without_one(program.root):
            one = replace(program, root=root)
            with contextlib.suppress(Exception):
                found = outcome(one)
                if found.how == how and found.error >= 0.01 * error:
                    program, smaller = one, True
                    break
    return program


def _without_one(node: Node) -> Iterator[Node]:
    yield from node.children
    for i, child in enumerate(node.children):
        for less in _without_one(child):
            yield replace(node, children=(*node.children[:i], less, *node.children[i + 1 :]))
