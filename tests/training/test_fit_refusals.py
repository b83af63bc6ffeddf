"""What `fit` refuses, and what stops it: losses that are not finite, data, options."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
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


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(4), 0


class Promising(IterableDataset):
    def __len__(self):
        return 5

    def __iter__(self):
        return iter(())


class Images(Dataset):
    """Yields what a careless dataset may yield."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item


def uneven(items):
    return torch.zeros(len(items), 4).double(), torch.zeros(len(items) + 1, dtype=torch.int64)


def none_of_them(items):
    return torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(vectors(), 4, collate_fn=none_of_them), "a batch without samples"),
        (TensorDataset(torch.zeros(0, 4), torch.zeros(0)), "data is empty$"),
        (DataLoader(vectors(count=3), batch_size=4, drop_last=True), "empty: .*drop_last"),
        (DataLoader(Promising()), "yielded no batch"),
        (Endless(), "must have a length, this Endless has none"),
        (DataLoader(Endless()), "must have a length, this DataLoader has none"),
        (vectors().tensors, "data must be a DataLoader or a Dataset .* got a tuple"),
        (Images(torch.zeros(4)), r"\(input, target\) batches, got a Tensor"),
        (Images((torch.zeros(4), 1, 2)), r"got a (list|tuple) of 3: \(Tensor, Tensor, Tensor\)"),
        (Images((torch.zeros(4), "cat")), r"must be tensors, got .*\(Tensor, (list|tuple)\)"),
        (DataLoader(vectors(), 4, collate_fn=uneven), r"got shapes \(4, 4\) and \(5,\)"),
    ],
)
def test_refuses_data(data, message):
    with pytest.raises(ArgumentError, match=message):
        quiet(linear(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
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
