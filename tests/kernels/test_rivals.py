"""Ours, PyTorch's MATH attention and, where installed, jvp-flash-attention on the same cases.

Every error is ‖found - exact‖ / ‖exact‖, the worst over a case's results; exact is MATH in
float64. Ours is asserted. The other two are printed beside it, once all cases are through.

The rival (MIT) runs each case in a process of its own: some cases write outside its tensors.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.func import grad, jvp, vmap

import tangent_ops
from tests.ops import oracle

RIVAL = "jvp-flash-attention"
INSTALLED = importlib.util.find_spec("jvp_flash_attention") is not None

Op = Callable[..., Tensor]
Operands = tuple[Tensor, ...]


# --- the derivatives -------------------------------------------------------------------------


def output_and_tangent(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    return jvp(op, p, t)


def tangent_of_query_only(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    return jvp(lambda q: op(q, *p[1:]), p[:1], t[:1])


def tangents_mapped(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """Three tangents at one primal."""
    stacks = [torch.stack([x, -2 * x, x.flip(-2)]) for x in t]
    return (vmap(lambda *one: jvp(op, p, one)[1])(*stacks),)


def gradient_of_tangents(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """Of a loss of the output's tangent: a training step of a tangent model."""
    return grad(lambda t: (jvp(op, p, t)[1] * w).sum())(t)


def gradient_by_output(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """Of query, key and value, of a loss of the output that a jvp returns."""
    leaves = tuple(x.clone().requires_grad_() for x in p)
    return torch.autograd.grad((jvp(op, leaves, t)[0] * w).sum(), leaves)


def gradient_by_both(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """Of query, key and value, of a loss of output and tangent."""
    leaves = tuple(x.clone().requires_grad_() for x in p)
    output, output_t = jvp(op, leaves, t)
    return torch.autograd.grad(((output + output_t) * w).sum(), leaves)


def hessian_vector_product(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """Forward over reverse."""
    return jvp(lambda *p: grad(lambda p: (op(*p) * w).sum())(p), p, t)[1]


def no_tangent(op: Op, p: Operands, t: Operands, w: Tensor) -> Operands:
    """An ordinary call, and its gradients."""
    leaves = tuple(x.clone().requires_grad_() for x in p)
    output = op(*leaves)
    return (output, *torch.autograd.grad((output * w).sum(), leaves))


# --- the cases -------------------------------------------------------------------------------


def some(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A boolean mask in which every query has a key."""
    mask = torch.rand(shape, generator=generator) > 0.3
    mask[..., 0] = True
    return mask


def some_and_an_empty_row(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = some(shape, generator)
    mask[..., 5, :] = False
    return mask


def bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def bias_and_minus_100(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """-100 is the rival's constant for "masked out"; it requires one at least."""
    return bias(shape, generator).masked_fill(~some(shape, generator), -100.0)


def zero_and_minus_100(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape).masked_fill(~some(shape, generator), -100.0)


def zero_and_minus_infinity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape).masked_fill(~some(shape, generator), -torch.inf)


@dataclass(frozen=True)
class Case:
    name: str
    derivative: Callable[[Op, Operands, Operands, Tensor], Operands] = output_and_tangent
    queries: int = 64
    keys: int = 64
    dim: int = 64
    heads: int = 2
    key_heads: int = 2
    mask: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None
    mask_shape: tuple[int, ...] = (1, 2, 64, 64)
    options: dict[str, Any] = field(default_factory=dict)  # of scaled_dot_product_attention
    of_rival: dict[str, Any] = field(default_factory=dict)  # options that only the rival has
    dtype: torch.dtype = torch.float16


UNCHECKED = {"verify_attn_mask": False}
CASES = [
    Case("jvp, float16"),
    Case("jvp, float32", dtype=torch.float32),
    Case("jvp, 33 tokens", queries=33, keys=33),
    Case("jvp, 34 tokens", queries=34, keys=34),
    Case("jvp, 64 queries and 96 keys", keys=96),
    Case("jvp, head dimension 16", dim=16),
    Case("jvp, head dimension 40", dim=40),
    Case("jvp, causal", options={"is_causal": True}),
    Case("jvp, boolean mask (B, H, N, N)", mask=some),
    Case("jvp, boolean mask, a row empty", mask=some_and_an_empty_row),
    Case("jvp, boolean mask (1, 1, 1, N)", mask=some, mask_shape=(1, 1, 1, 64)),
    Case("jvp, additive mask of 0 and -100", mask=zero_and_minus_100),
    Case("jvp, additive mask of 0 and -inf", mask=zero_and_minus_infinity),
    Case("jvp, additive bias and -100", mask=bias_and_minus_100),
    Case("jvp, additive bias", mask=bias),
    Case("the same, verify_attn_mask=False", mask=bias, of_rival=UNCHECKED),
    Case("jvp, 4 query and 2 key heads", heads=4, options={"enable_gqa": True}),
    Case("jvp, only the query has a tangent", tangent_of_query_only),
    Case("vmap over 3 tangents", tangents_mapped),
    Case("gradient of q, k, v by the output", gradient_by_output),
    Case("gradient of q, k, v by output and tangent", gradient_by_both),
    Case("gradient of the tangents", gradient_of_tangents),
    Case("Hessian-vector product, jvp of grad", hessian_vector_product),
    Case("no tangent: output and gradients", no_tangent),
]
TITLES = ("case", "ours", "MATH", "rival")


def run(op: Op, case: Case, device: str, dtype: torch.dtype) -> Operands:
    """The results of a case; its operands are rounded to the case's dtype before ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        drawn = torch.randn(1, heads, tokens, case.dim, generator=generator)
        return drawn.to(case.dtype).to(device, dtype)

    def triple() -> Operands:
        return (
            draw(case.heads, case.queries),
            draw(case.key_heads, case.keys),
            draw(case.key_heads, case.keys),
        )

    primals, tangents, weight = triple(), triple(), draw(case.heads, case.queries)
    options = dict(case.options)
    if case.mask is not None:
        mask = case.mask(case.mask_shape, generator)
        if mask.is_floating_point():
            mask = mask.to(case.dtype).to(dtype)
        options["attn_mask"] = mask.to(device)
    return case.derivative(partial(op, **options), primals, tangents, weight)


# --- the three ops ---------------------------------------------------------------------------

ours = partial(tangent_ops.scaled_dot_product_attention, backend="triton")


def rival(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    **of_rival: Any,
) -> Tensor:
    """The rival's op under our names; it has no flag for grouped heads, and checks no heads."""
    module = importlib.import_module("jvp_flash_attention.jvp_attention")
    return module.JVPAttn.fwd_dual(query, key, value, attn_mask, causal=is_causal, **of_rival)


def run_rival(name: str, device: str) -> list[Any] | str:
    """In a process of its own: the results as arrays, or what was raised."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = next(case for case in CASES if case.name == name)
    try:
        results = run(partial(rival, **case.of_rival), case, device, case.dtype)
        return [x.detach().double().cpu().numpy() for x in results]
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "InterpreterError" else None
        return f"raises {type(cause or error).__name__}"


def error_of_rival(case: Case, device: str, exact: Operands) -> str:
    if not INSTALLED:
        return "not installed"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            found = pool.submit(run_rival, case.name, device).result()
        except BrokenProcessPool:
            return "crashes"
    if isinstance(found, str):
        return found
    return worst(tuple(map(torch.from_numpy, found)), tuple(x.cpu() for x in exact))


def worst(found: Operands, exact: Operands) -> str:
    errors = [
        oracle.error(one, right) / float(right.detach().norm())
        for one, right in zip(found, exact, strict=True)
    ]
    return f"{max(errors, key=lambda e: float('inf') if e != e else e):.1e}"


# --- the comparison --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    """Rows of a table, printed when the module is done."""
    rows: list[tuple[str, ...]] = []
    yield rows
    if not rows:
        return
    version = importlib.metadata.version(RIVAL) if INSTALLED else "(not installed)"
    where = "through Triton's interpreter on a CPU"
    if torch.cuda.is_available():
        where = f"on {torch.cuda.get_device_name()}"
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(
            f"\n\nErrors relative to MATH in float64, {where};\ntorch {torch.__version__}, "
            f"triton {triton.__version__}; the rival is {RIVAL} {version}\n"
        )
        for row in (TITLES, *rows):
            print(f"{row[0]:44}{row[1]:9} {row[2]:9} {row[3]}")


# Triton's interpreter computes rows and keys past the end, which a GPU rounds to infinity.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_as_good_as_math(case: Case, device: str, report: list[tuple[str, ...]]) -> None:
    exact = run(oracle.math_attention, case, device, torch.float64)
    eager = run(oracle.math_attention, case, device, case.dtype)
    theirs = error_of_rival(case, device, exact)
    try:
        found = run(ours, case, device, case.dtype)
    except Exception as error:
        report.append((case.name, f"raises {type(error).__name__}", worst(eager, exact), theirs))
        raise
    report.append((case.name, worst(found, exact), worst(eager, exact), theirs))
    oracle.assert_as_good_as(found, exact, eager)
