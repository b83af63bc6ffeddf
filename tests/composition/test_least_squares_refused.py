"""What least-squares weights refuse."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import nn
from torch.utils.data import TensorDataset

import tangent_ops
from tangent_ops.composition.compose import compose
from tangent_ops.composition.least_squares import LeastSquaresWeights
from tangent_ops.delta import Delta, DeltaMeta
from tangent_ops.errors import ArgumentError, DeltaError, NonFiniteLossError
from tangent_ops.losses import RescaledSquareLoss


def indefinite(logits, targets):
    return (logits[:, 0].square() - logits[:, 1:].square().sum(1)).mean()


def linear(logits, targets):
    return logits.mean()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), "quadratic in the logits, CrossEntropyLoss is not: .*RescaledSq"),
        (F.cross_entropy, "quadratic in the logits, cross_entropy is not"),
        (RescaledSquareLoss(reduction="sum"), "mean of the samples' own losses"),
        (RescaledSquareLoss(reduction="none"), "must return a scalar tensor"),
        (indefinite, "convex in the logits, indefinite is not"),
    ],
)
def test_refuses_losses(tangent, deltas, data, loss, message):
    refused(ArgumentError, message, LeastSquaresWeights, deltas, tangent, data, loss=loss)


def test_a_linear_loss_has_no_minimum_without_ridge(tangent, deltas, data):
    with pytest.raises(ArgumentError, match="not unique"):
        LeastSquaresWeights(deltas, tangent, data, loss=linear).weights()


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf"), "much"])
def test_refuses_ridges(tangent, deltas, data, ridge):
    with pytest.raises(ArgumentError, match="ridge must be finite and not negative"):
        LeastSquaresWeights(deltas, tangent, data, ridge=ridge)


@pytest.mark.parametrize("keep", [[0, 0], [4], [-1], [True], [0.0], ["0"]])
def test_refuses_positions(tangent, deltas, data, keep):
    fitted = LeastSquaresWeights(deltas, tangent, data)
    refused(ArgumentError, "keep must be distinct positions from 0 to 3", fitted.weights, keep)
    refused(ArgumentError, "keep is empty", fitted.weights, [])


def test_refuses_deltas_and_models(tangent, deltas, data):
    refused(ArgumentError, "deltas is empty", LeastSquaresWeights, [], tangent, data)
    refused(ArgumentError, "use a list", LeastSquaresWeights, deltas[0], tangent, data)
    with pytest.raises(ArgumentError, match="delta 1 must be a dict of tensors or a path"):
        LeastSquaresWeights([deltas[0], 1], tangent, data)
    with pytest.raises(ArgumentError, match="must be a LinearizedModel, got a Sequential"):
        LeastSquaresWeights(deltas, tangent.anchor, data)
    stranger = Delta(deltas[1], DeltaMeta("b" * 64, "other", "head"))
    with pytest.raises(DeltaError, match="delta 1 belongs to another anchor"):
        LeastSquaresWeights([deltas[0], stranger], tangent, data)
    with pytest.raises(DeltaError, match=r"delta 0 does not fit: missing 0\.bias, 0\.weight"):
        LeastSquaresWeights([{"2.bias": deltas[0]["2.bias"]}], tangent, data)
    with pytest.raises(DeltaError, match=r"delta 0 has values that are not finite in 2\.bias"):
        LeastSquaresWeights([deltas[0] | {"2.bias": torch.full((3,), torch.nan)}], tangent, data)


def test_a_bad_delta_is_refused_before_the_data_are_read(tangent, deltas):
    class Unread(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("the data were read")

    unread = Unread(torch.zeros(2, 4))
    with pytest.raises(DeltaError, match="delta 1 has no tensors"):
        LeastSquaresWeights([deltas[0], {}], tangent, unread)


def test_refuses_data_and_outputs(tangent, deltas, data):
    with pytest.raises(ArgumentError, match="must be a DataLoader or a Dataset"):
        LeastSquaresWeights(deltas, tangent, data.tensors)
    with pytest.raises(ArgumentError, match=r"must yield \(input, target\) batches"):
        LeastSquaresWeights(deltas, tangent, TensorDataset(data.tensors[0]))
    broken = TensorDataset(torch.full((2, 4), torch.nan, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteLossError, match="outputs with delta 0 are not finite"):
        LeastSquaresWeights(deltas, tangent, broken)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, inputs):
            return self.linear(inputs), inputs

    pair = tangent_ops.linearize(Pair())
    with pytest.raises(ArgumentError, match="one output tensor, got a tuple"):
        LeastSquaresWeights([pair.delta_dict()], pair, data)


def test_compose_refuses_what_does_not_go_together(tangent, deltas, data):
    with pytest.raises(ArgumentError, match=r"needs tangent=\.\.\. and data=\.\.\."):
        compose(deltas, "least-squares", data=data)
    with pytest.raises(ArgumentError, match=r"needs tangent=\.\.\. and data=\.\.\."):
        compose(deltas, "least-squares", tangent=tangent)
    with pytest.raises(ArgumentError, match="must be numbers or 'least-squares', got 'best'"):
        compose(deltas, "best", tangent=tangent, data=data)
    refused(ArgumentError, "ridge is for weights='least-squares' only", compose, deltas, ridge=0.1)
    with pytest.raises(ArgumentError, match="tangent is for weights='least-squares' only"):
        compose(deltas, [1.0] * 4, tangent=tangent, data=data)
