"""What `fit_private` refuses: data, preprocessing, options, losses and models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from private_runs import COUNT, a_tangent, data, run
from refusals import refused
from small_models import images
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.privacy.checks import check_contents
from tangent_ops.privacy.per_sample.gradients import per_sample_gradients
from tangent_ops.training.options import Recipe


class Fitted:
    def __init__(self) -> None:
        self.mean_ = 0.5

    def __call__(self, x):
        return x - self.mean_


class Photos(TensorDataset):
    transform: object = None


class Stream(IterableDataset):
    def __iter__(self):
        yield from [data()[0]]


def photos(transform) -> Photos:
    dataset = Photos(images(COUNT), torch.arange(COUNT) % 5)
    dataset.transform = transform
    return dataset


def composed(*steps):
    return SimpleNamespace(transforms=[*steps])


def standardised(dims) -> TensorDataset:
    x = images(COUNT) * 3 + 1
    x = (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True)
    return TensorDataset(x, torch.arange(COUNT) % 5)


@pytest.mark.parametrize(
    "dataset",
    [
        photos(Fitted()),
        Subset(photos(composed(str, Fitted())), range(20)),
        ConcatDataset(
            [
                Subset(photos(None), range(10)),
                Subset(photos(composed(composed(Fitted()))), range(10, COUNT)),
            ]
        ),
        standardised((0,)),
        standardised((0, 2, 3)),
    ],
)
def test_refuses_preprocessing_that_was_fitted(dataset):
    tangent = a_tangent()
    refused(UnsupportedError, "public_preprocessing=True", run, tangent, dataset)
    assert not any(delta.any() for delta in tangent.deltas().values())
    said = run(tangent, dataset, public_preprocessing=True, steps=1).statement
    assert any("preprocessing learned" in line for line in said.assumes)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (DataLoader(data()), r"pass loader\.dataset"),
        (Stream(), "map-style"),
        ([1, 2], "map-style"),
        (Subset(data(), []), "empty"),
        (Subset(data(), [0, 1, 2, 1]), "one sample 2 times"),
        (ConcatDataset([whole := data(), Subset(whole, [4])]), "one sample 2 times"),
    ],
)
def test_refuses_data(dataset, message):
    refused(ArgumentError, message, run, None, dataset)


def copied(target: int, *, much: float = 0.0) -> TensorDataset:
    """The data with a copy of sample 4 as sample 30."""
    inputs, classes = data().tensors
    again = inputs[4:5] + much
    return TensorDataset(torch.cat([inputs, again]), torch.cat([classes, torch.tensor([target])]))


class Decoded(Dataset):
    """Reads each sample anew, and draws a random number as an augmentation does."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.inner = dataset

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        torch.rand(1)
        x, y = self.inner[index]
        return x.numpy().copy(), int(y)


@pytest.mark.parametrize(
    "dataset",
    [
        copied(4),
        copied(1),  # a copy with another target is still a copy
        Decoded(copied(4)),
        ConcatDataset([data(), Subset(copied(4), [30])]),
        ConcatDataset([data(), data()]),
    ],
)
def test_refuses_a_copy_of_a_sample(dataset):
    with pytest.raises(ArgumentError, match=r"one sample 2 times: the inputs [04] and 30 are the"):
        run(None, dataset)


def test_reading_the_contents_takes_what_differs_and_draws_no_random_numbers():
    other = copied(4, much=2.0**-20)
    assert not torch.equal(other[4][0], other[30][0])
    state = torch.get_rng_state()
    check_contents(DataLoader(Decoded(other), 7, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delta": 1 / COUNT}, r"not below 1/N = 0\.0333"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be positive"),
        ({"noise_multiplier": None}, "one of target_epsilon and noise_multiplier"),
        ({"target_epsilon": 1.0}, "one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ({"noise_multiplier": None, "target_epsilon": -1.0}, "target_epsilon must be positive"),
        ({"expected_batch_size": COUNT + 1}, "from 1 to the number of samples, 30"),
        ({"steps": 0}, "steps"),
        ({"mode": "fast"}, r"mode must be one of \['bookkeeping'"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"schedule": "up"}, "schedule must be one of"),
        ({"start": "somewhere"}, "start must be one of"),
        ({"l2": -1.0}, "l2 must be finite and not negative"),
        ({"seed": 0, "secure_mode": True}, "seed and secure"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "mean of the samples"),
        ({"checkpoint": "/nowhere/fit"}, "checkpoint=/nowhere/fit: it is in"),
        ({"max_grad_norm": None}, r"give Privacy\(max_grad_norm="),
        ({"epochs": 15}, r"does not use the recipe's epochs: give Privacy\(steps="),
        ({"recipe": Recipe(seed=1)}, r"recipe's seed: give Privacy\(seed="),
        ({"rate": 0.1}, "fit_private has no option 'rate'; there are loss, .*checkpoint"),
    ],
)
def test_refuses_options(options, message):
    tangent = a_tangent()
    refused(ArgumentError, message, run, tangent, **options)
    assert not any(delta.any() for delta in tangent.deltas().values())


def test_refuses_losses_that_mix_samples_though_the_first_do_not_show_it():
    """Class weights and ignored targets tie a sample's gradient to the others of its batch."""
    inputs, classes = images(COUNT), torch.arange(5).repeat_interleave(6)
    data = TensorDataset(inputs, classes)
    weights = torch.tensor([1.0, 2, 3, 4, 5])
    for loss in (nn.CrossEntropyLoss(weights), nn.CrossEntropyLoss(ignore_index=4)):
        refused(ArgumentError, "mean of the samples", run, dataset=data, loss=loss)
    unknown = TensorDataset(inputs, classes.clone().index_fill(0, torch.tensor([29]), -100))
    with pytest.raises(ArgumentError, match="mean of the samples"):
        run(dataset=unknown, loss=nn.CrossEntropyLoss(), expected_batch_size=COUNT, steps=1)
    with pytest.raises(ArgumentError, match="mean of the samples"):
        per_sample_gradients(a_tangent(), inputs[:6], classes[:6], nn.CrossEntropyLoss(weights))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(12, track_running_stats=False), "training"])
def test_refuses_a_batch_norm_that_uses_its_batch(norm):
    layer = nn.BatchNorm1d(12) if norm == "training" else norm
    tangent = linearize(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 5)))
    if norm == "training":
        run(tangent, TensorDataset(torch.randn(COUNT, 6) + 1, torch.arange(COUNT) % 5))
        tangent = linearize(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 5)))
        tangent.anchor.train()
    with pytest.raises(UnsupportedError, match=r"^1 is a batch norm"):
        run(tangent, TensorDataset(torch.randn(COUNT, 6) + 1, torch.arange(COUNT) % 5))


def test_refuses_an_ordinary_model():
    refused(ArgumentError, "LinearizedModel", run, nn.Linear(2, 2), data())


def test_a_sample_that_is_not_finite_stops_it():
    x, y = data().tensors
    x[3] = float("nan")
    tangent = a_tangent()
    with pytest.raises(NonFiniteLossError, match="gradient of a sample"):
        run(tangent, TensorDataset(x, y), expected_batch_size=COUNT, steps=1)
    assert not any(delta.any() for delta in tangent.deltas().values())
