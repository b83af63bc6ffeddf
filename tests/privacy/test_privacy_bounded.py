"""Bounds on each sample's gradient, curvature and Jacobian norm, against dense matrices."""

import math

import pytest
import torch
from bounded_problem import (
    BOUNDS,
    CLASSES,
    INPUTS,
    L2,
    QUIET,
    B,
    M,
    N,
    R,
    Written,
    dense,
    flat,
    objective,
    outliers,
    samples,
    tangent,
)
from refusals import refused
from small_models import images, vit
from torch.utils.data import DataLoader, TensorDataset

from tangent_ops import last_blocks, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.privacy.convex.bounded import BoundedSquareLoss, Bounds
from tangent_ops.privacy.convex.jacobian_norms import jacobian_norms


def directions(count, scale):
    noise = torch.Generator().manual_seed(7)
    size = flat(tangent().deltas()).numel()
    return scale * torch.randn(count, size, dtype=torch.float64, generator=noise)


def test_norms_are_the_largest_singular_values():
    data = outliers()
    found = jacobian_norms(tangent(), data, **QUIET)
    exact = torch.linalg.svdvals(dense(data)[0])[:, 0]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_norms_with_cached_features_and_in_single_precision():
    model = vit(depth=2, embed_dim=12, num_heads=2)
    data = TensorDataset(images(5), torch.zeros(5, dtype=torch.int64))
    plain = linearize(model, last_blocks(model, 1))
    exact = jacobian_norms(linearize(model.double(), last_blocks(model, 1)), _double(data), **QUIET)
    for cache in (False, True):
        found = jacobian_norms(plain, DataLoader(data, 3), cache=cache, progress=False)
        # The slack that the weights leave for single precision.
        assert float((found / exact - 1).abs().max()) < 1e-4 / 4


def _double(data):
    inputs, targets = data.tensors
    return TensorDataset(inputs.double(), targets)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1e3, 1e8])
def test_no_sample_has_a_gradient_above_the_bound(scale):
    """The gradient over one sample is Objective's, less the penalty."""
    data = outliers()
    for index in range(0, len(data), 2):
        one = TensorDataset(*(column[index : index + 1] for column in data.tensors))
        problem = objective(one, normalizer=1.0)
        for delta in directions(2, scale):
            found = float((problem.gradient(delta) - L2 * delta).norm())
            # The penalty's rounding, which is taken off again.
            assert found <= R * B + 1e-14 * L2 * float(delta.norm())
    # And the bound is reached.
    if scale >= 1e3:
        assert found >= 0.5 * R * B


@pytest.mark.parametrize("normalizer", [None, 20.0])
@pytest.mark.parametrize("data", [samples(), outliers()], ids=["samples", "outliers"])
def test_gradient_is_the_written_one(data, normalizer):
    problem = objective(data, normalizer=normalizer)
    written = Written(data, normalizer or len(data))
    for delta in directions(3, 0.5):
        exact = written.gradient(delta)
        found = problem.gradient(delta)
        # The weights' slack for rounding, on gradients of RB at most and residuals' B.
        assert float((found - exact).norm()) <= 1e-10 * (R * B + L2 * float(delta.norm()))
    assert problem.sensitivity == pytest.approx(R * B / (normalizer or len(data)))


@pytest.mark.parametrize("index", range(0, 16, 3))
def test_curvature_of_a_sample_is_between_0_and_the_bound(index):
    one = TensorDataset(*(column[index : index + 1] for column in outliers().tensors))
    problem = objective(one, normalizer=1.0).passes
    for delta in directions(3, 1.0):
        at = problem.logits(delta)
        for direction in (*directions(3, 1.0), dense(one)[0][0, 0]):
            direction = direction / direction.norm()
            curvature = float(direction @ problem.product(direction, at, penalty=False))
            assert -1e-12 <= curvature <= R**2


def test_hessian_products_are_differences_of_gradients():
    data = outliers()
    problem = objective(data).passes
    written = Written(data, len(data))
    for delta in directions(2, 1.0):
        at = problem.logits(delta)
        for direction in directions(2, 0.2):
            ahead, behind = (written.gradient(delta + t * direction) for t in (1e-6, -1e-6))
            slope = (ahead - behind) / 2e-6
            found = problem.product(direction, at)
            assert float((slope - found).norm()) < 1e-6 * float(found.norm())


def test_loss_is_the_rescaled_square_loss_where_nothing_is_clipped():
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(6, CLASSES, dtype=torch.float64, generator=noise)
    classes = torch.randint(CLASSES, (6,), generator=noise)
    packed = torch.stack([classes.double(), torch.ones(6, dtype=torch.float64)], dim=1)
    found = BoundedSquareLoss(B=1e9, M=M)(logits, packed)
    assert float(found) == pytest.approx(
        CLASSES / 2 * float(RescaledSquareLoss(k=1, M=M)(logits, classes)), rel=1e-12
    )


def test_loss_at_its_corners():
    """The gradient is 0 at the target, and joins at ‖r‖ = B."""
    loss = BoundedSquareLoss(B=B, M=M)
    packed = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    at_target = torch.tensor([[0.0, M, 0.0]], dtype=torch.float64, requires_grad=True)
    value = loss(at_target, packed)
    (gradient,) = torch.autograd.grad(value, at_target)
    assert value.item() == 0 and not gradient.any()
    for size, exact in ((B, B**2 / 2), (B + 1, B * (B + 1 - B / 2)), (1e150, 1e150 * B)):
        logits = torch.tensor([[size, M, 0.0]], dtype=torch.float64, requires_grad=True)
        value = loss(logits, packed)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(exact, rel=1e-12)
        assert float(gradient.norm()) == pytest.approx(B, rel=1e-12)


def test_weights_depend_on_the_sample_alone():
    data = outliers()
    part = TensorDataset(*(column[3:8] for column in data.tensors))
    whole, part = (torch.stack([row for _, row in objective(d).data.dataset]) for d in (data, part))
    assert torch.equal(whole[3:8], part)
    assert float(whole[:, 1].max()) == 1.0 and float(whole[:, 1].min()) < 0.1


def test_a_loaders_own_batches_and_collate():
    def collate(items):
        return torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])

    data = samples()
    plain = objective(data).gradient(directions(1, 0.5)[0])
    loader = DataLoader(data, batch_size=5, shuffle=True, collate_fn=collate)
    found = objective(loader).gradient(directions(1, 0.5)[0])
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-14)


def test_refuses_targets_that_are_no_classes():
    inputs = torch.zeros(N, INPUTS, dtype=torch.float64)
    for targets, match in (
        (torch.zeros(N), "class indices of shape"),
        (torch.zeros(N, 1, dtype=torch.int64), "class indices of shape"),
        (torch.full((N,), CLASSES), f"from 0 to {CLASSES - 1}"),
        (torch.full((N,), -1), f"from 0 to {CLASSES - 1}"),
        (torch.zeros(N, dtype=torch.bool), "class indices of shape"),
    ):
        refused(ArgumentError, match, objective, TensorDataset(inputs, targets))


def test_refuses_samples_and_models_that_no_bound_holds_for():
    inputs, targets = samples().tensors
    inputs = inputs.clone()
    inputs[2, 1] = math.nan
    refused(ArgumentError, "not finite", objective, TensorDataset(inputs, targets))
    half = linearize(torch.nn.Linear(INPUTS, CLASSES).bfloat16())
    refused(UnsupportedError, "bfloat16", objective, samples(), model=half)
    for l2 in (0.0, -1.0, math.nan):
        refused(ArgumentError, "l2 must be positive", objective, samples(), l2=l2)


@pytest.mark.parametrize("name", [*BOUNDS, "normalizer"])
def test_refuses_bounds_that_are_none(name):
    values = {"jacobian": R, "residual": B, "target": M, "normalizer": None}
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match=f"{name} must be positive and finite"):
            Bounds(*(values | {name: value}).values())
