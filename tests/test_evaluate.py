"""`predict` and `accuracy`; and the data that they and `fit` refuse."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tangent_ops.errors import ArgumentError
from tangent_ops.evaluate import accuracy, predict
from tangent_ops.training.fit import fit


class Pairs(Dataset):
    """A dataset of the given items, whatever they are."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture
def data():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(23, 6), torch.randint(4, (23,)))


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()  # a mode of its own
    return model


def numpy_logits(model, inputs):
    first, norm, _, last = model
    with torch.no_grad():
        hidden = inputs.numpy() @ first.weight.numpy().T + first.bias.numpy()
        hidden = (hidden - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        hidden = hidden * norm.weight.numpy() + norm.bias.numpy()
        return hidden @ last.weight.numpy().T + last.bias.numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 128])
def test_predict_and_accuracy_in_the_order_of_the_data(model, data, batch_size):
    expected = numpy_logits(model, data.tensors[0])
    logits = predict(model, data, batch_size=batch_size)
    assert np.allclose(logits.numpy(), expected, atol=1e-5)
    assert not logits.requires_grad
    right = expected.argmax(1) == data.tensors[1].numpy()
    assert 0 < right.mean() < 1
    assert accuracy(model, data, batch_size=batch_size) == pytest.approx(right.mean(), abs=1e-12)
    assert accuracy(model, DataLoader(data, batch_size=7)) == pytest.approx(right.mean(), abs=1e-12)


def test_predict_takes_inputs_without_targets(model, data):
    expected = predict(model, data)
    assert torch.equal(predict(model, TensorDataset(data.tensors[0])), expected)
    assert torch.equal(predict(model, Pairs(*data.tensors[0])), expected)


def test_modes_and_statistics_and_generators_are_left_alone(model, data):
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    running_mean = model[1].running_mean.clone()
    generator = torch.get_rng_state()
    predict(model, data)
    accuracy(model, data)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, running_mean)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


def test_modes_and_grad_mode_come_back_after_an_error(model, data):
    model.register_forward_hook(lambda *args: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        accuracy(model, data)
    assert model.training and torch.is_grad_enabled()


class Stream(IterableDataset):
    """A stream without samples."""

    def __iter__(self):
        return iter(())


class Promising(Stream):
    def __len__(self):
        return 5


def fit_it(model, data):
    return fit(model, data, progress=False)


FEW = TensorDataset(torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
OF_ALL = [
    (torch.zeros(3, 6), "data must be a DataLoader or a Dataset .* got a Tensor: wrap tensors"),
    (FEW.tensors, "data must be a DataLoader or a Dataset .* got a tuple"),
    ([(torch.zeros(6), 1)], "got a list"),
    (TensorDataset(torch.zeros(0, 6), torch.zeros(0)), "data is empty$"),
    (DataLoader(FEW, batch_size=4, drop_last=True), "empty: .*drop_last=True"),
    (Stream(), "must have a length, this Stream has none"),
    (DataLoader(Stream()), "must have a length, this DataLoader has none"),
]
OF_INPUTS = [
    (Pairs({"image": torch.zeros(6)}), "of the (dict|fields)"),
    (Pairs(("a", "b")), r"got a (list|tuple) of 2: \((list|tuple), "),
]
OF_PAIRS = [
    (DataLoader(Promising()), "yielded no batch"),
    (Pairs(*torch.zeros(4, 6)), r"\(input, target\) batches, got a Tensor"),
    (
        Pairs((torch.zeros(6), 1, 2)),
        r"got a (list|tuple) of 3: \(Tensor, Tensor, Tensor\)",
    ),
    (
        Pairs((torch.zeros(6), "cat")),
        r"must be tensors, got .*\(Tensor, (list|tuple)\)",
    ),
    (
        DataLoader(FEW, 2, collate_fn=lambda items: (torch.zeros(2, 6), torch.zeros(3))),
        r"got shapes \(2, 6\) and \(3,\)",
    ),
    (
        DataLoader(FEW, 2, collate_fn=lambda items: (torch.zeros(0, 6), torch.zeros(0))),
        "a batch without samples",
    ),
]
REFUSED = [
    *((run, *each) for run in (predict, accuracy, fit_it) for each in OF_ALL),
    *((run, *each) for run in (predict, accuracy) for each in OF_INPUTS),
    *((fit_it, *each) for each in OF_PAIRS),
]


@pytest.mark.parametrize(("run", "data", "message"), REFUSED)
def test_refuses_data(model, run, data, message):
    with pytest.raises(ArgumentError, match=message):
        run(model, data)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_refuses_batch_sizes(model, data, batch_size):
    with pytest.raises(ArgumentError, match=f"batch_size must be .* got {batch_size}"):
        predict(model, data, batch_size=batch_size)


def test_accuracy_refuses_other_shapes(data):
    with pytest.raises(ArgumentError, match=r"\(N, C\) .* got \(23, 2, 3\) and \(23,\)"):
        accuracy(nn.Unflatten(1, (2, 3)), data)
    soft = TensorDataset(data.tensors[0], torch.zeros(23, 4))
    with pytest.raises(ArgumentError, match=r"got \(23, 6\) and \(23, 4\)"):
        accuracy(nn.Identity(), soft)


def test_the_bar_can_be_turned_off(model, data, capsys):
    accuracy(model, data, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moves_model_and_batches(model, data):
    expected = predict(model, data)
    logits = predict(model, data, device="cuda")
    assert next(model.parameters()).is_cuda and not logits.is_cuda
    assert torch.allclose(logits, expected, atol=1e-3)
    assert 0 <= accuracy(model, data) <= 1
