"""Derivatives of a tangent by the input, where PyTorch's own rules raise or are wrong in silence.

The oracle is a central difference of the tangent in float64, whose tangents PyTorch computes right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import generator, shaken, swin
from torch import Tensor, nn

from tangent_ops import fused_forward_ad, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.functional import softmax
from tests.ops.oracle import of_some, pushforward

# A central difference errs by h²/6 times a third derivative, 1e-11 times at most hundreds here,
# and by the tangent's rounding over h, 1e-10.
STEP, TOLERANCE = 1e-5, 1e-7

Op = Callable[..., Tensor]


def tangent(op: Op, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    found = pushforward(op, primals, tangents)[1]
    assert found is not None
    return found


def central_difference(op: Op, primals, tangents, direction: Tensor) -> Tensor:
    """The derivative of the sum of sin(tangent) along a direction of the first primal."""
    first, *rest = primals
    both = [
        tangent(op, (first + s * direction, *rest), tangents).sin().sum() for s in (STEP, -STEP)
    ]
    return (both[0] - both[1]) / (2 * STEP)


def orders(op: Op, primals, tangents, direction: Tensor) -> dict[str, Tensor]:
    """The same derivative by PyTorch's four ways to nest."""
    first, *rest = primals
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def by_jvp(x):
        operands = [x, *rest]
        function = of_some(op, operands, moving)
        along = tuple(tangents[i] for i in moving)
        return torch.func.jvp(function, tuple(operands[i] for i in moving), along)[1].sin().sum()

    def tracked(function):
        leaf = first.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf)
        return (grad * direction).sum()

    return {
        "dual level": tracked(lambda x: tangent(op, (x, *rest), tangents).sin().sum()),
        "tracked jvp": tracked(by_jvp),
        "grad of jvp": (torch.func.grad(by_jvp)(first) * direction).sum(),
        "jvp of jvp": torch.func.jvp(by_jvp, (first,), (direction,))[1],
    }


def check(op: Op, primals, tangents, direction: Tensor) -> None:
    exact = central_difference(op, primals, tangents, direction)
    with fused_forward_ad():
        found = orders(op, primals, tangents, direction)
    for way, one in found.items():
        error = float((one - exact).abs() / (1 + exact.abs()))
        assert error <= TOLERANCE, (way, float(one), float(exact))


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    source = generator(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]


aten = torch.ops.aten
STATISTICS = (torch.linspace(-0.5, 0.5, 4).double(), torch.linspace(0.5, 1.5, 4).double())
# Of x (3, 4, 5), weight and bias (4,): torch.batch_norm's own order of arguments after those.
TRAINING, EVAL = (None, None, True, 0.1, 1e-5), (*STATISTICS, False, 0.1, 1e-5)
CHANNELS: dict[str, Op] = {
    "F.batch_norm, training": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "F.batch_norm, eval": lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b),
    "torch.batch_norm, training": lambda x, w, b: torch.batch_norm(x, w, b, *TRAINING, False),
    "torch.batch_norm, eval": lambda x, w, b: torch.batch_norm(x, w, b, *EVAL, False),
    "torch.native_batch_norm, training": lambda x, w, b: torch.native_batch_norm(
        x, w, b, *TRAINING
    )[0],
    "torch.native_batch_norm, eval": lambda x, w, b: torch.native_batch_norm(x, w, b, *EVAL)[0],
    "aten.batch_norm": lambda x, w, b: aten.batch_norm.default(x, w, b, *TRAINING, False),
    "F.instance_norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "F.instance_norm, eval": lambda x, w, b: F.instance_norm(
        x, *STATISTICS, w, b, use_input_stats=False
    ),
    "torch.instance_norm": lambda x, w, b: torch.instance_norm(x, w, b, *TRAINING, False),
    "F.group_norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "torch.group_norm": lambda x, w, b: torch.group_norm(x, 2, w, b),
    "torch.native_group_norm": lambda x, w, b: torch.native_group_norm(x, w, b, 3, 4, 5, 2, 1e-5)[
        0
    ],
}
# Of x (3, 5, 4), weight and bias (4,).
ROWS: dict[str, Op] = {
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (4,), w, b),
    "torch.layer_norm": lambda x, w, b: torch.layer_norm(x, (4,), w, b, 1e-5, False),
    "torch.native_layer_norm": lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 1e-5)[0],
    "aten.layer_norm": lambda x, w, b: aten.layer_norm.default(x, [4], w, b),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (4,), w) + b,
    "torch.rms_norm": lambda x, w, b: torch.rms_norm(x, (4,), w) + b,
}


@pytest.mark.parametrize("moves", ["everything", "the input", "the weight"])
@pytest.mark.parametrize("name", [*CHANNELS, *ROWS])
def test_norms(name, moves) -> None:
    shape = (3, 4, 5) if name in CHANNELS else (3, 5, 4)
    x, w, b, x_t, w_t, b_t, direction = draw(shape, (4,), (4,), shape, (4,), (4,), shape)
    tangents: list[Tensor | None] = [x_t, w_t, b_t]
    if moves == "the input":
        tangents[1:] = None, None
    elif moves == "the weight":  # whose factor x̂ depends on x all the same
        tangents[0] = tangents[2] = None
    check((CHANNELS | ROWS)[name], (x, w, b), tangents, direction)


TARGET = torch.tensor([2, 0, 3])
OF_SOFTMAX: dict[str, Op] = {
    "F.softmax": lambda x: F.softmax(x, -1),
    "torch.softmax": lambda x: torch.softmax(x, 0),
    "torch.special.softmax": lambda x: torch.special.softmax(x, -1),
    "ours": lambda x: softmax(x, -1),
    "F.log_softmax": lambda x: F.log_softmax(x, -1),
    "Tensor.log_softmax": lambda x: x.log_softmax(-1),
    "torch.special.log_softmax": lambda x: torch.special.log_softmax(x, -1),
    "F.softmin": lambda x: F.softmin(x, -1),
    "torch.logsumexp": lambda x: torch.logsumexp(x, -1),
    "Tensor.logsumexp": lambda x: x.logsumexp((0, 1)),
    "torch.special.logsumexp": lambda x: torch.special.logsumexp(x, -1),
    "Tensor.logcumsumexp": lambda x: x.logcumsumexp(-1),
    "F.cross_entropy": lambda x: F.cross_entropy(x, TARGET),
    "F.cross_entropy, smoothed": lambda x: F.cross_entropy(
        x, TARGET, torch.linspace(0.5, 1.5, 4).double(), label_smoothing=0.1
    ),
    "nn.CrossEntropyLoss": lambda x: nn.CrossEntropyLoss(reduction="none")(x, TARGET),
    "F.gumbel_softmax": lambda x: (torch.manual_seed(0), F.gumbel_softmax(x))[1],
}
if hasattr(F, "linear_cross_entropy"):
    WEIGHT = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).sin()
    OF_SOFTMAX["F.linear_cross_entropy"] = lambda x: F.linear_cross_entropy(x, WEIGHT, TARGET)
OF_NORMS: dict[str, Op] = {
    "F.normalize, 1": lambda x: F.normalize(x, 1.0, -1),
    "F.normalize, 2": lambda x: F.normalize(x, dim=-1),
    "F.normalize, 3": lambda x: F.normalize(x, 3.0, -1),
    "F.normalize, inf": lambda x: F.normalize(x, float("inf"), -1),
    "Tensor.norm": lambda x: x.square().norm(1, -1),
    "torch.norm": lambda x: torch.norm(x.square(), 1, -1),
    "torch.linalg.vector_norm": lambda x: torch.linalg.vector_norm(x.square(), 1, -1),
    "torch.linalg.norm": lambda x: torch.linalg.norm(x.square(), 1, -1),
    "torch.linalg.matrix_norm": lambda x: torch.linalg.matrix_norm(x.square(), 1),
    "torch.dist": lambda x: torch.dist(x.square(), x, 1),
    "F.pairwise_distance": lambda x: F.pairwise_distance(x.square(), x, 1),
    "F.triplet_margin_loss": lambda x: F.triplet_margin_loss(x, x.flip(0), x.square(), p=1),
    "torch.renorm": lambda x: torch.renorm(x.square(), 1, 0, 0.5),
}


@pytest.mark.parametrize("name", [*OF_SOFTMAX, *OF_NORMS])
def test_rules_that_overwrite_what_they_need(name) -> None:
    x, x_t, direction = draw((3, 4), (3, 4), (3, 4))
    check((OF_SOFTMAX | OF_NORMS)[name], (x,), (x_t,), direction)


def test_a_mode_is_entered_for_the_call_alone() -> None:
    x, x_t = draw((3, 4), (3, 4))
    depth = torch._C._len_torch_dispatch_stack()
    with fused_forward_ad():
        tangent(OF_SOFTMAX["F.log_softmax"], (x.requires_grad_(),), (x_t,))
        with pytest.raises(IndexError):
            tangent(lambda x: x.log_softmax(7), (x,), (x_t,))
    assert torch._C._len_torch_dispatch_stack() == depth


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x, need_weights=True)[0]


class Head(nn.Sequential):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(nn.Linear(6, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.function(super().forward(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True)), (2, 3, 4, 4)),
    "batch norm": (lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 5, 5)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), (2, 3, 5, 5)),
    "attention with weights": (lambda: SelfAttention(6, 2, batch_first=True), (2, 3, 6)),
    "swin": (lambda: swin(img_size=16, window_size=2, depths=(2, 1)), (1, 3, 16, 16)),
    "log_softmax": (lambda: Head(lambda x: x.log_softmax(-1)), (2, 6)),
    "logsumexp": (lambda: Head(lambda x: x.logsumexp(-1)), (2, 6)),
    "cross entropy": (lambda: Head(lambda x: F.cross_entropy(x, TARGET[:2])), (2, 6)),
    "softmin": (lambda: Head(lambda x: F.softmin(x, -1)), (2, 6)),
    "normalize": (lambda: Head(lambda x: F.normalize(x, p=1)), (2, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_input_gradient_of_a_linearized_model(name) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = linearize(shaken(make()).double())
    source = generator(3)
    with torch.no_grad():
        for delta in model.deltas().values():
            delta.copy_(torch.randn(delta.shape, generator=source))
    x, direction = draw(shape, shape)

    def loss(x):
        return model.primal_and_tangent(x)[1].sin().sum()

    with torch.no_grad():
        exact = (loss(x + STEP * direction) - loss(x - STEP * direction)) / (2 * STEP)
    (grad,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    # The third derivatives of a whole model, with deltas of size 1, come to thousands.
    assert float((grad * direction).sum()) == pytest.approx(float(exact), rel=1e-6, abs=1e-6)


def test_running_statistics_are_kept_as_pytorch_keeps_them() -> None:
    x, x_t, statistics = *draw((3, 4, 5), (3, 4, 5)), (torch.zeros(4), torch.ones(4))
    for op in (F.batch_norm, F.instance_norm):
        own, ours = ([s.double().clone() for s in statistics] for _ in range(2))
        value = op(x, *own, None, None, True)
        with fused_forward_ad():
            found = pushforward(
                lambda x, op=op, ours=ours: op(x, *ours, None, None, True),
                (x.requires_grad_(),),
                (x_t,),
            )
        assert torch.equal(found[0], value)
        assert all(map(torch.equal, own, ours))
        x = x.detach()


def test_values_of_norms_are_pytorchs() -> None:
    x, w, b, x_t = (z.float() for z in draw((3, 4, 5), (4,), (4,), (3, 4, 5)))
    for name, op in CHANNELS.items():
        if "norm, eval" in name:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            operands = [z.to(dtype) for z in (x, w, b)]
            value = op(*operands)
            with fused_forward_ad():
                tracked = operands[0].clone().requires_grad_()
                found = pushforward(op, (tracked, *operands[1:]), (x_t.to(dtype), None, None))
            assert torch.equal(found[0], value), name
            assert found[1].dtype == dtype


def test_compiled() -> None:
    x, w, b, x_t, direction = draw((3, 4, 5), (4,), (4,), (3, 4, 5), (3, 4, 5))
    op = CHANNELS["F.batch_norm, training"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def slope(x):
        with fused_forward_ad():
            inner = lambda x: torch.func.jvp(lambda x: op(x, w, b), (x,), (x_t,))[1].sin().sum()  # noqa: E731
            return torch.func.grad(inner)(x)

    exact = central_difference(op, (x, w, b), (x_t, None, None), direction)
    assert float((slope(x) * direction).sum()) == pytest.approx(float(exact), rel=TOLERANCE)


FACTORIZING: dict[str, Callable[[Tensor], Any]] = {
    "torch.linalg.solve": lambda x: torch.linalg.solve(x, x.new_ones(3)),
    "torch.linalg.solve_ex": lambda x: torch.linalg.solve_ex(x, x.new_ones(3))[0],
    "torch.linalg.tensorsolve": lambda x: torch.linalg.tensorsolve(x, x.new_ones(3)),
    "torch.linalg.det": torch.linalg.det,
    "Tensor.det": lambda x: x.det(),
    "torch.logdet": torch.logdet,
    "torch.linalg.slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "torch.linalg.householder_product": lambda x: torch.linalg.householder_product(x, x[0]),
}


@pytest.mark.parametrize("name", FACTORIZING)
def test_factorizations_are_refused_where_they_would_be_wrong(name) -> None:
    op = FACTORIZING[name]
    x, x_t, direction = draw((3, 3), (3, 3), (3, 3))
    x = 3 * torch.eye(3).double() + 0.5 * x
    refused = pytest.raises(UnsupportedError, match="lu_factor and lu_solve")

    def by_jvp(x):
        return torch.func.jvp(op, (x,), (x_t,))[1].sum()

    with fused_forward_ad():
        with refused:
            tangent(op, (x.clone().requires_grad_(),), (x_t,))
        with refused:
            by_jvp(x.clone().requires_grad_())
        with refused:
            torch.func.grad(by_jvp)(x)
        with refused:
            torch.func.jvp(by_jvp, (x,), (direction,))
        # What PyTorch gets right stays: the tangent, and forward over reverse.
        found = tangent(op, (x,), (x_t,))
        gradient = torch.func.grad(lambda x: op(x).sum())
        hessian_product = torch.func.jvp(gradient, (x,), (x_t,))[1]
        torch.func.vmap(by_jvp)(torch.stack([x, 2 * x]))
    exact = (op(x + STEP * x_t) - op(x - STEP * x_t)) / (2 * STEP)
    torch.testing.assert_close(found, exact, rtol=TOLERANCE, atol=TOLERANCE)
    exact = (gradient(x + STEP * x_t) - gradient(x - STEP * x_t)) / (2 * STEP)
    torch.testing.assert_close(hessian_product, exact, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_way_out_of_a_factorization() -> None:
    x, x_t, direction = draw((3, 3), (3, 3), (3, 3))
    x = 3 * torch.eye(3).double() + 0.5 * x
    right = x.new_ones(3, 1)
    check(
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), right), (x,), (x_t,), direction
    )
