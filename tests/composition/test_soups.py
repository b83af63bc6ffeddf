import copy

import numpy as np
import pytest
import torch
from small_models import family, vit
from torch import nn
from torch.utils.data import TensorDataset

import tangent_ops
from tangent_ops.composition.soups import Ensemble, greedy_soup, uniform_soup
from tangent_ops.errors import ArgumentError
from tangent_ops.evaluate import accuracy


def mlp(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[1].running_mean.normal_()
    return model.to(dtype)


def means(models):
    """By numpy, in float64."""
    states = [model.state_dict() for model in models]
    return {
        name: np.mean([state[name].double().numpy() for state in states], axis=0)
        for name in states[0]
    }


# Uniform


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_uniform_is_the_mean_rounded_once(dtype, count):
    models = [mlp(seed, dtype) for seed in range(count)]
    found = uniform_soup(models)
    for name, exact in means(models).items():
        assert found[name].dtype == models[0].state_dict()[name].dtype
        # numpy's mean of float64 entries may differ in the last bit.
        exact = torch.as_tensor(exact)
        assert ((exact - 1e-15).to(dtype) <= found[name]).all()
        assert (found[name] <= (exact + 1e-15).to(dtype)).all()
    models[0].load_state_dict(found)


def test_small_weights_are_not_lost_among_large_ones():
    states = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert uniform_soup(states)["w"].item() == np.float32(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_takes_state_dicts_and_iterators_and_leaves_them_alone(dtype):
    models = [mlp(seed, dtype) for seed in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    found = uniform_soup(models)
    again = uniform_soup(model.state_dict() for model in models)
    assert all(torch.equal(found[name], value) for name, value in again.items())
    for value in found.values():
        value.add_(1)  # their memory is their own
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], old[name]) for name in old)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_uniform_of_timm_models(name):
    one, other = family(name), family(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    one.load_state_dict(uniform_soup([one, other]))
    middle = dict(one.named_parameters())
    for key, parameter in other.named_parameters():
        assert torch.allclose(middle[key], parameter - 0.05, rtol=0, atol=1e-6)


def test_integer_buffers_have_to_be_equal():
    one, other = mlp(0), mlp(1)
    one[1].num_batches_tracked.fill_(7)
    with pytest.raises(ArgumentError, match=r"model 1: 1\.num_batches_tracked .*int64.* differs"):
        uniform_soup([one, other])
    other[1].num_batches_tracked.fill_(7)
    found = uniform_soup([one, other])["1.num_batches_tracked"]
    assert found.item() == 7 and found.dtype == torch.int64


def test_uniform_refuses():
    model = mlp(0)
    state = model.state_dict()
    with pytest.raises(ArgumentError, match="models is empty"):
        uniform_soup([])
    for one in (model, state):
        with pytest.raises(ArgumentError, match="use a list"):
            uniform_soup(one)
    with pytest.raises(ArgumentError, match=r"model 1 must be an nn\.Module or a state dict"):
        uniform_soup([model, 3])
    less = {name: value for name, value in state.items() if name != "0.bias"}
    with pytest.raises(ArgumentError, match=r"same names: model 1 lacks 0\.bias$"):
        uniform_soup([model, less])
    with pytest.raises(ArgumentError, match=r"model 1 has, the first lacks 0\.bias$"):
        uniform_soup([less, model])
    with pytest.raises(ArgumentError, match=r"0\.bias is .* of shape \(1,\), the first's .*\(8,\)"):
        uniform_soup([model, state | {"0.bias": torch.zeros(1)}])
    with pytest.raises(ArgumentError, match=r"model 1: 0\.weight is torch\.float64"):
        uniform_soup([model, mlp(1, torch.float64)])
    with pytest.raises(ArgumentError, match="model 0: note is a str"):
        uniform_soup([state | {"note": "x"}])
    with pytest.raises(ArgumentError, match="model 0 is linearized: use compose"):
        uniform_soup([tangent_ops.linearize(vit())])


# Greedy


class Chooser(nn.Module):
    """Class 0 left of a threshold, class 1 right of it."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))

    def forward(self, inputs):
        return torch.stack([self.threshold - inputs, inputs - self.threshold], dim=1)


# The right threshold is 5: of 20 samples those between a threshold and 5 are wrong.
LINE = TensorDataset(torch.arange(20) / 2 + 0.25, (torch.arange(20) / 2 + 0.25 > 5).long())


def test_greedy_leaves_out_what_harms():
    models = [Chooser(threshold) for threshold in (6.0, 3.0, 9.0, 7.5)]
    assert [round(20 * (1 - accuracy(model, LINE))) for model in models] == [2, 4, 8, 5]
    # By hand: 6 (2 wrong); (6 + 3) / 2 = 4.5 (1); (6 + 3 + 7.5) / 3 = 5.5 (1); with 9: 6.375 (3).
    soup, members = greedy_soup(models, LINE)
    assert members == [0, 1, 3]
    assert soup["threshold"].item() == 5.5
    mean = uniform_soup(models)
    assert mean["threshold"].item() == 6.375
    assert [model.threshold.item() for model in models] == [6.0, 3.0, 9.0, 7.5]


def test_greedy_goes_by_accuracy_not_by_position():
    """From the first one, 9 on, the soup would hold all; from the best one it is that one."""
    models = [Chooser(threshold) for threshold in (9.0, 0.0, 5.0, 3.0)]
    soup, members = greedy_soup(models, LINE)
    # 5 (0 wrong); with 3: 4 (2 wrong), out; with 9: 7 (4), out; with 0: 2.5 (5), out.
    assert members == [2]
    assert soup["threshold"].item() == 5.0


def test_greedy_compares_with_the_soup_so_far():
    models = [Chooser(threshold) for threshold in (6.0, 4.0, 8.0)]
    soup, members = greedy_soup(models, LINE)
    # 6 (2 wrong); 5 (0); with 8: 6 again (2), no worse than the first alone, but than the soup.
    assert members == [0, 1]
    assert soup["threshold"].item() == 5.0


def test_equal_accuracy_is_enough_and_ties_go_as_they_come():
    models = [Chooser(threshold) for threshold in (5.5, 4.5, 5.6)]
    soup, members = greedy_soup(models, LINE)
    assert members == [0, 1, 2]  # all 1 wrong alone; 5.0 (0), then 5.2 (0)
    assert soup["threshold"].item() == pytest.approx(5.2, abs=1e-6)


def test_greedy_leaves_modes_and_models_alone():
    models = [mlp(seed) for seed in range(3)]
    models[1].eval()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    soup, members = greedy_soup(models, data, batch_size=7, progress=False)
    assert [model.training for model in models] == [True, False, True]
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], old[name]) for name in old)
    expected = means([models[index] for index in members])
    assert all(
        np.allclose(soup[n].numpy(), value, rtol=0, atol=1e-6) for n, value in expected.items()
    )


def test_greedy_refuses_before_any_work():
    model = Chooser(5.0)
    with pytest.raises(ArgumentError, match="models is empty"):
        greedy_soup([], LINE)
    with pytest.raises(ArgumentError, match="use a list"):
        greedy_soup(model, LINE)
    with pytest.raises(ArgumentError, match=r"model 1 must be an nn\.Module, got a dict"):
        greedy_soup([model, dict(model.state_dict())], LINE)
    with pytest.raises(ArgumentError, match="data must be a DataLoader or a Dataset"):
        greedy_soup([model], LINE.tensors)

    class Unread(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("the data were read")

    with pytest.raises(ArgumentError, match="must have the same names"):
        greedy_soup([model, mlp(0)], Unread(torch.zeros(2)))


# Ensemble


@pytest.mark.parametrize("count", [1, 3])
def test_an_ensemble_is_the_mean_of_outputs(count):
    models = [mlp(seed, torch.float64).eval() for seed in range(count)]
    inputs = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = np.mean([model(inputs).numpy() for model in models], axis=0)
        assert np.allclose(Ensemble(models)(inputs).numpy(), expected, rtol=0, atol=1e-14)


def test_an_ensemble_is_a_module():
    models = [mlp(seed) for seed in range(2)]
    ensemble = Ensemble(iter(models)).eval()
    assert not any(model.training for model in models)  # held, not copied
    assert len([*ensemble.parameters()]) == sum(len([*model.parameters()]) for model in models)
    data = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    assert 0 <= accuracy(ensemble, data) <= 1


def test_an_ensemble_refuses():
    with pytest.raises(ArgumentError, match="models is empty"):
        Ensemble([])
    with pytest.raises(ArgumentError, match=r"model 1 must be an nn\.Module, got a dict"):
        Ensemble([mlp(0), {}])
    narrow = Ensemble([mlp(0).eval(), nn.Linear(4, 1)])  # (6, 1) would broadcast
    with pytest.raises(ArgumentError, match=r"model 1 returns shape \(6, 1\), model 0 \(6, 3\)"):
        narrow(torch.randn(6, 4))
    pair = nn.Module()
    pair.forward = lambda inputs: (inputs, inputs)
    with pytest.raises(ArgumentError, match="model 1 returns a tuple, not a tensor"):
        Ensemble([nn.Identity(), pair])(torch.randn(6, 4))
