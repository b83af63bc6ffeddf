"""The contract of every operation in dual_ops.py, by every backend.

The oracle is torch.func.jvp and autograd in float64, of PyTorch's own function or of the same in
elementary operations. The reference is compared in float64, the kernels in float32.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.dual_op import _Dual
from tests.ops import nestings, oracle
from tests.ops.backends import backends, device_of, examples
from tests.ops.contract import CLOSE, check, derivatives, pushed
from tests.ops.dual_ops import ATTENTION, OPS, Op

NORMS = tuple(name for name in OPS if "norm" in name)


def every(names, *those: str):
    """Parametrizes by the named operations and the backends among ``those`` that have them."""
    table = OPS | ATTENTION
    pairs = [
        pytest.param(name, backend, id=f"{name}-{backend}", marks=getattr(each, "marks", ()))
        for each in backends(*those)
        for name in names
        for backend in getattr(each, "values", (each,))
        if backend in table[name].backends or backend == "default"
    ]
    return pytest.mark.parametrize("name, backend", pairs)


every_op = every([*OPS, *ATTENTION], "reference", "triton")
every_op_but_attention = every(OPS, "reference", "triton")
both_ways = pytest.mark.parametrize("tracked", [False, True], ids=["frozen", "tracked"])


def row(name: str, backend: str) -> tuple[Op, Any, dict[str, Any]]:
    """The operation, by this backend, and the precision and device that it is tested in."""
    op = (OPS | ATTENTION)[name]
    chosen = None if backend == "default" else backend
    dtype = torch.float32 if backend == "triton" else torch.float64
    kind = {"dtype": dtype, "device": device_of(backend)}
    return op, functools.partial(op.ours, backend=chosen), kind


@pytest.fixture
def own_calls(monkeypatch):
    """The backend of every call that is not left to PyTorch."""
    calls = []
    original = _Dual.forward
    counted = staticmethod(lambda *a: calls.append(a[1]) or original(*a))
    monkeypatch.setattr(_Dual, "forward", counted)
    return calls


def subsets(name: str, tangents: list[Tensor]):
    """Tangents of any of the operands, None for the others; for attention of all, and of each."""
    for present in itertools.product([True, False], repeat=len(tangents)):
        if any(present) and (name not in ATTENTION or sum(present) in (1, len(tangents))):
            yield [t if here else None for t, here in zip(tangents, present, strict=True)]


@both_ways
@every_op
def test_every_subset_of_tangents(name, backend, tracked, own_calls) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = op.draw(**kind)
    fused = backend in op.fused and (backend == "triton" or not tracked)
    for some in subsets(name, tangents):
        own_calls.clear()
        with oracle.poison():
            check(op, ours, primals, some, tracked)
        assert set(own_calls) == ({backend} if fused else set())


@every_op
def test_by_jvp_with_frozen_and_in_a_level_with_tracked_primals(name, backend) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = op.draw(**kind)
    check(op, ours, primals, tangents, tracked=False, level=False)
    check(op, ours, primals, tangents, tracked=True, level=True)


def second(function, primals, tangents, tracked: bool, level: bool):
    """Gradients of the gradients that a loss has."""
    primals = [p.requires_grad_(tracked) for p in primals]
    leaves = [t.requires_grad_() for t in tangents]
    output, output_t = pushed(function, primals, leaves, level)
    loss = (output_t.sin() * output_t).sum()
    if tracked:
        loss = loss + (output.sin() * output).sum()
    leaves += primals if tracked else []
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)


@both_ways
@every_op
def test_derivatives_of_the_backward_pass(name, backend, tracked) -> None:
    """From saved tensors: in a dual level, and by jvp where primals are tracked."""
    op, ours, kind = row(name, backend)
    operands = op.draw((3,), 8, **kind)
    exact = second(op.exact, *oracle.double(operands), tracked, False)
    if op.fused == ("triton",) and backend == "triton" and not tracked:
        with pytest.raises(UnsupportedError, match="no second derivative by the tangents"):
            second(ours, *operands, tracked, True)
        return
    for one, right in zip(second(ours, *operands, tracked, not tracked), exact, strict=True):
        if backend == "reference":
            torch.testing.assert_close(one, right, **CLOSE[one.dtype])
        else:
            assert oracle.error(one, right) <= 1e-4 * float(right.norm()) + 1e-5


PYTORCH_RAISES = [("silu", nestings.backward_in_a_dual_level)]


@pytest.mark.parametrize("case", nestings.CASES, ids=lambda case: case.__name__)
@every_op
def test_nestings(name, backend, case) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = map(tuple, op.draw((2, 3), 8, **kind))
    others = tuple(op.draw((2, 3), 8, seed=1, **kind)[0])
    if (name, case) in PYTORCH_RAISES:
        with pytest.raises(NotImplementedError, match="forward AD with aten::silu_backward"):
            case(ours, primals, tangents, others)
        return
    found = case(ours, primals, tangents, others)
    exact = case(op.exact, *oracle.double([primals, tangents, others]))
    for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        torch.testing.assert_close(one.double(), right, **CLOSE[kind["dtype"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@both_ways
@every_op_but_attention
def test_low_precision(name, backend, tracked, dtype) -> None:
    op, ours, kind = row(name, backend)
    check(op, ours, *op.draw(**kind | {"dtype": dtype}), tracked)


@every(OPS, "triton")
def test_more_than_a_tile(name, backend, monkeypatch) -> None:
    op, ours, kind = row(name, backend)
    monkeypatch.setattr("tangent_kernels.layer_norm.PARTS", 1)  # one program walks over all rows
    for tracked in (False, True):
        with oracle.poison():
            check(op, ours, *op.draw((70,), **kind), tracked)


def contiguous(x: Tensor) -> Tensor:
    return x


def spread(x: Tensor) -> Tensor:
    """Neighbours are two elements apart."""
    return torch.stack([x, x], -1)[..., 0]


def half(x: Tensor) -> Tensor:
    """Rows are twice their width apart."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def transposed(x: Tensor) -> Tensor:
    """The first and the last dimension are swapped in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = [contiguous, spread, half, transposed]


@examples(8)
@given(
    lead=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 70),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=8, max_size=8),
    tracked=st.booleans(),
    seed=st.integers(0, 9),
)
@every_op_but_attention
def test_any_shape_and_stride(name, backend, lead, width, layouts, tracked, seed) -> None:
    op, ours, kind = row(name, backend)
    if name in NORMS:
        width = max(width, 4)  # narrower rows nearly fix x̂, so derivatives are mostly rounding
    primals, tangents = op.draw(tuple(lead), width, seed, **kind)
    laid = [layout(x) for layout, x in zip(layouts, primals + tangents, strict=False)]
    check(op, ours, laid[: len(primals)], laid[len(primals) :], tracked)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (0, 3), (2, 1, 2, 1)])
@pytest.mark.parametrize("width", [3, 0])
@every([name for name in OPS if "convolution" not in name], "default", "reference")
def test_one_vector_no_elements_and_five_dimensions(name, backend, lead, width) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = op.draw(lead, width, **kind)
    for some in subsets(name, tangents):
        for level in (True, False):
            check(op, ours, primals, some, tracked=False, level=level)


@pytest.mark.parametrize("name", ["gelu", "silu", "softmax"])
def test_numbers_without_a_dimension(name) -> None:
    op, ours, _ = row(name, "default")
    primals = [torch.tensor(0.3 + i).double() for i in range(len(op.shapes((), 1)))]
    check(op, ours, primals, [p.cos() for p in primals], tracked=False)


@every_op_but_attention
def test_autocast_casts_as_pytorchs_does(name, backend) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = op.draw(**kind | {"dtype": torch.float32})
    with torch.autocast(device_of(backend), torch.bfloat16):
        found, eager = (
            derivatives(function, primals, tangents, False, level)
            for function, level in ((ours, True), (op.pytorchs, False))
        )
    wide = oracle.double(primals), oracle.double(tangents)
    exact = derivatives(op.exact, *wide, False, False)
    assert [x.dtype for x in tree_leaves(found)] == [x.dtype for x in tree_leaves(eager)]
    oracle.assert_as_good_as(found, exact, eager)


@every_op
def test_a_model_may_change_the_output_in_place(name, backend) -> None:
    op, ours, kind = row(name, backend)
    primals, tangents = op.draw(**kind)

    def changed(*operands):
        return ours(*operands).mul_(2.0).add_(1.0)

    if "softmax" in name or (name in ATTENTION and backend == "triton"):
        # Their backward pass starts from the output, as PyTorch's own does.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            derivatives(changed, primals, tangents, False, True)
        return
    for some in subsets(name, tangents):
        found = derivatives(changed, primals, some, False, True)
        wide = oracle.double(primals), oracle.double(some)
        exact = derivatives(lambda *a: 2.0 * op.exact(*a) + 1.0, *wide, False, False)
        for one, right in zip(tree_leaves(found), tree_leaves(exact), strict=True):
            torch.testing.assert_close(one.double(), right, **CLOSE[kind["dtype"]])


@every_op
def test_no_tangent_is_kept_where_primals_are_frozen(name, backend) -> None:
    op, ours, kind = row(name, backend)
    if backend not in op.fused and name not in ATTENTION:
        pytest.skip("PyTorch's own rules")
    primals, tangents = op.draw(**kind)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output, _ = pushed(ours, primals, [t.requires_grad_() for t in tangents], level=True)
    known = [*primals, output]
    for x in kept:
        if x.shape in {y.shape for y in known}:  # the others are statistics
            assert any(x.shape == y.shape and x.equal(y) for y in known)
