"""`fit` stops at losses that are not finite, and refuses losses and models.

The data that it refuses are in tests/test_evaluate.py, its other options in test_options.py.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_cases import assert_equal, linear, parameters_of, quiet, vectors

from tangent_ops.errors import ArgumentError, NonFiniteLossError


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_stops_before_the_step(optimizer):
    inputs, targets = (tensor.clone() for tensor in vectors(count=6).tensors)
    clean = TensorDataset(inputs[:4].clone(), targets[:4])
    inputs[4] = float("nan")
    options = {"optimizer": optimizer, "schedule": "constant", "lr": 0.01, "epochs": 1}
    expected, model = linear(), linear()
    quiet(expected, DataLoader(clean, batch_size=2), **options)
    message = r"epoch 1 of 1, step 3 of 3, at lr=0\.01; .*inputs for NaN.* lower lr"
    with pytest.raises(NonFiniteLossError, match=message):
        quiet(model, DataLoader(TensorDataset(inputs, targets), batch_size=2), **options)
    assert_equal(parameters_of(model), parameters_of(expected))
    assert model.weight.grad is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: (0 * logits).sum().sqrt(),  # 0, its gradient NaN
        lambda logits, targets: logits.sum() + math.inf,  # its gradient finite
    ],
)
def test_either_of_loss_and_gradient_stops_it(loss):
    model = linear()
    before = parameters_of(model)
    with pytest.raises(NonFiniteLossError, match="loss or its gradient"):
        quiet(model, vectors(), loss=loss)
    assert_equal(parameters_of(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": nn.MSELoss(reduction="none")}, r"a scalar tensor, got shape \(8, 3\)"),
        ({"loss": lambda logits, targets: None}, "a scalar tensor, got None"),
        ({"loss": lambda logits, targets: torch.zeros(())}, "does not depend on any trainable"),
    ],
)
def test_refuses_options(options, message):
    model = linear()
    before = parameters_of(model)
    data = TensorDataset(torch.zeros(8, 4).double(), torch.zeros(8, 3).double())
    with pytest.raises(ArgumentError, match=message):
        quiet(model, data, **options)
    assert_equal(parameters_of(model), before)


def test_refuses_a_model_without_trainable_parameters():
    with pytest.raises(ArgumentError, match="no trainable parameters"):
        quiet(linear().requires_grad_(False), vectors())
