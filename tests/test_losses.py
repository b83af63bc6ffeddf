"""RescaledSquareLoss against its formula, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangent_ops.errors import ArgumentError
from tangent_ops.losses import RescaledSquareLoss


def oracle(logits, targets, k, M):
    """Hui & Belkin's formula, one sample and one class at a time, in numpy."""
    samples, classes = logits.shape
    losses = np.zeros(samples)
    for n in range(samples):
        for i in range(classes):
            f = logits[n, i]
            losses[n] += k * (f - M) ** 2 if i == targets[n] else f**2
    return losses / classes


@given(
    samples=st.integers(1, 6),
    classes=st.integers(1, 7),
    k=st.floats(0.1, 20),
    M=st.floats(0.1, 30),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_matches_the_formula(samples, classes, k, M, seed):
    rng = np.random.default_rng(seed)
    logits, targets = 5 * rng.normal(size=(samples, classes)), rng.integers(classes, size=samples)
    expected = oracle(logits, targets, k, M)
    inputs = torch.from_numpy(logits), torch.from_numpy(targets)

    assert np.allclose(RescaledSquareLoss(k, M, "none")(*inputs), expected, rtol=1e-12)
    assert RescaledSquareLoss(k, M)(*inputs).item() == pytest.approx(expected.mean(), rel=1e-12)
    assert RescaledSquareLoss(k, M, "sum")(*inputs).item() == pytest.approx(
        expected.sum(), rel=1e-12
    )


def test_defaults_are_k_1_and_m_15():
    loss = RescaledSquareLoss()(torch.tensor([[15.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    assert loss.item() == (0 + 15**2 / 2) / 2


def test_is_quadratic_in_the_logits():
    targets = torch.tensor([2])
    loss = RescaledSquareLoss(k=3.0, M=2.0)
    hessian = torch.func.hessian(lambda f: loss(f[None], targets))
    expected = torch.tensor([2.0, 2.0, 6.0, 2.0], dtype=torch.float64).diag() / 4
    for scale in (0.0, 1.0, 100.0):  # the same everywhere
        assert torch.allclose(hessian(scale * torch.randn(4, dtype=torch.float64)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_on_in_float32(dtype):
    logits, targets = torch.randn(8, 5).to(dtype), torch.arange(8) % 5
    loss = RescaledSquareLoss()(logits, targets)
    assert loss.dtype == torch.float32
    assert loss == RescaledSquareLoss()(logits.float(), targets)


def test_gradients_per_sample_with_vmap():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    loss = RescaledSquareLoss()

    def of_one(row, target):
        return loss(row[None], target[None])

    found = torch.vmap(torch.func.grad(of_one))(logits, targets)
    together = torch.func.grad(RescaledSquareLoss(reduction="sum"))(logits, targets)
    assert torch.allclose(found, together)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be positive"),
        ({"M": -1}, "M must be positive"),
        ({"M": float("nan")}, "M must be positive"),
        ({"reduction": "avg"}, "reduction must be one of"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        RescaledSquareLoss(**arguments)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(5), torch.tensor([0]), r"logits .* \(N, C\).*\(5,\)"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), "floating point"),
        (torch.zeros(2, 5), torch.tensor([0, 1, 2]), r"shape \(2,\).*\(3,\)"),
        (torch.zeros(2, 5), torch.tensor([0.0, 1.0]), "int64 class indices.*float32"),
        (torch.zeros(2, 5), torch.zeros(2, 5), r"int64 class indices.*\(2, 5\)"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), "from 0 to 4: index 5 is out"),
        (torch.zeros(2, 5), torch.tensor([-100, 1]), "from 0 to 4: index -100 is out"),
    ],
)
def test_refuses_bad_inputs(logits, targets, message):
    with pytest.raises(ArgumentError, match=message):
        RescaledSquareLoss()(logits, targets)


def test_its_repr_names_the_settings():
    assert repr(RescaledSquareLoss(k=2)) == "RescaledSquareLoss(k=2, M=15, reduction='mean')"
