"""`fit`: the problem that it solves, parts of batches, schedules, seeds, modes."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training_cases import (
    assert_equal,
    generator_states,
    images,
    linear,
    parameters_of,
    quiet,
    tiny_vit,
    vectors,
)

from tangent_ops.errors import NonFiniteLossError, UnsupportedError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearize import linearize
from tangent_ops.training.fit import fit
from tangent_ops.training.head import fit_head
from tangent_ops.training.options import SCHEDULES

# The problem it solves


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.2), ("adamw", 0.1)])
def test_reaches_the_ridge_optimum(optimizer, lr):
    """min_W mean (XW - Y)^2 + l2/2 |W|^2, against numpy's least squares."""
    rng = np.random.default_rng(0)
    x, y, l2 = rng.normal(size=(12, 4)), rng.normal(size=(12, 3)), 0.3
    rows = np.concatenate([x * math.sqrt(1 / y.size), math.sqrt(l2 / 2) * np.eye(4)])
    right = np.concatenate([y * math.sqrt(1 / y.size), np.zeros((4, 3))])
    expected = np.linalg.lstsq(rows, right)[0]

    model = linear(bias=False)
    history = quiet(
        model,
        TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),
        loss=F.mse_loss,
        l2=l2,
        lr=lr,
        optimizer=optimizer,
        batch_size=12,
        epochs=400,
    )
    assert np.allclose(model.weight.detach().numpy().T, expected, atol=1e-6)
    objective = ((rows @ expected - right) ** 2).sum()
    assert history.loss[-1] == pytest.approx(objective, rel=1e-9)
    assert history.loss[0] > history.loss[-1]


def test_a_tangent_model_reaches_the_optimum_of_its_quadratic_problem():
    """Fitting f + J delta with the rescaled square loss is a least-squares problem in delta."""
    torch.manual_seed(4)
    tangent = linearize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    data, k, M, l2 = vectors(), 2.0, 3.0, 1.0
    x, targets = data.tensors
    anchor = dict(tangent.anchor.named_parameters())
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(tangent.anchor, w, (x,)))(
        anchor
    )
    columns = [block.detach().reshape(x.shape[0] * 3, -1) for block in jacobian.values()]
    is_target = F.one_hot(targets, 3).double().flatten()
    scale = ((1 + (k - 1) * is_target) / (3 * len(x))).sqrt()  # of each residual
    residual = M * is_target - tangent.anchor(x).flatten()
    matrix = scale[:, None] * torch.cat(columns, 1)
    size = matrix.shape[1]
    solution = np.linalg.lstsq(
        np.concatenate([matrix.numpy(), math.sqrt(l2 / 2) * np.eye(size)]),
        np.concatenate([(scale * residual).numpy(), np.zeros(size)]),
    )[0]

    options = {"l2": l2, "lr": 0.3, "optimizer": "sgd", "batch_size": 12, "epochs": 250}
    quiet(tangent, data, loss=RescaledSquareLoss(k, M), **options)
    found = np.concatenate([d.detach().numpy().ravel() for d in tangent.deltas().values()])
    assert [*jacobian] == [*tangent.deltas()]
    assert np.abs(solution).max() > 0.1
    assert np.allclose(found, solution, atol=1e-7)


def test_the_penalty_is_half_the_squared_norm():
    """One SGD step equals a step along autograd's gradient of loss + l2/2 |p|^2."""
    model, data, l2, lr = linear(), vectors(), 0.7, 0.01
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    model.register_parameter("frozen", frozen)
    twin = copy.deepcopy(model)
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    objective = RescaledSquareLoss()(twin(data.tensors[0]), data.tensors[1])
    objective = objective + l2 / 2 * sum(p.square().sum() for p in trained.values())
    gradients = torch.autograd.grad(objective, [*trained.values()])
    steps = {name: lr * g for name, g in zip(trained, gradients, strict=True)}

    history = quiet(
        model, data, l2=l2, lr=lr, optimizer="sgd", batch_size=12, epochs=1, schedule="constant"
    )
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name) - steps.get(name, 0)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-14), name
    assert history.loss[0] == pytest.approx(objective.item(), rel=1e-12)


def test_adamw_decays_nothing():
    model = linear()
    before = parameters_of(model)
    quiet(model, vectors(), loss=lambda logits, targets: 0 * logits.sum(), lr=0.1, epochs=2)
    assert_equal(parameters_of(model), before)


def test_the_reported_loss_is_the_mean_over_samples():
    model, data = linear(), vectors(count=7)
    expected = RescaledSquareLoss()(model(data.tensors[0]), data.tensors[1]).item()
    history = quiet(model, data, batch_size=3, lr=1e-12, epochs=2)  # batches of 3, 3 and 1
    assert history.loss == pytest.approx([expected, expected], rel=1e-9)
    assert history.steps == 6
    assert history.seconds > 0


# Parts of batches


def whole_batches(model, data, size, l2, lr):
    """Two epochs of plain SGD with momentum 0.9, in order, along autograd's gradient."""
    speed = [torch.zeros_like(p) for p in model.parameters()]
    inputs, targets = data.tensors
    for start in [*range(0, len(inputs), size)] * 2:
        logits, labels = model(inputs[start : start + size]), targets[start : start + size]
        wanted = 15.0 * F.one_hot(labels, 3)
        objective = (logits - wanted).square().mean()
        objective = objective + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        gradients = torch.autograd.grad(objective, [*model.parameters()])
        with torch.no_grad():
            for parameter, gradient, v in zip(model.parameters(), gradients, speed, strict=True):
                parameter.sub_(lr * v.mul_(0.9).add_(gradient))


@pytest.mark.parametrize(
    ("accumulate", "parts"),
    [(2, [3, 2, 3, 2, 1]), (3, [2, 2, 1, 2, 2, 1, 1]), (9, [1] * 11)],
)
def test_accumulation_takes_the_whole_batchs_step(accumulate, parts):
    """Parts of unequal size; the last batch has one sample, whose empty parts are skipped."""
    data, seen = vectors(count=11), []
    expected = nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3).double())
    model = copy.deepcopy(expected)
    whole_batches(expected, data, 5, 0.3, 0.05)
    model.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    options = {"l2": 0.3, "lr": 0.05, "optimizer": "sgd", "schedule": "constant", "epochs": 2}
    whole = quiet(copy.deepcopy(model), DataLoader(data, 5), **options)
    seen.clear()
    history = quiet(model, DataLoader(data, 5), accumulate=accumulate, **options)
    assert seen == 2 * parts
    assert history.steps == 6
    assert history.loss == pytest.approx(whole.loss, rel=1e-13)
    for name, parameter in model.named_parameters():
        error = (parameter - expected.get_parameter(name)).detach().abs().max()
        assert error < 1e-14, name


def test_a_nan_in_any_part_stops_before_the_step():
    inputs, targets = (tensor.clone() for tensor in vectors(count=6).tensors)
    inputs[5] = float("nan")
    model = linear()
    before = parameters_of(model)
    with pytest.raises(NonFiniteLossError, match="step 1 of 1"):
        quiet(model, DataLoader(TensorDataset(inputs, targets), 6), epochs=1, accumulate=3)
    assert_equal(parameters_of(model), before)
    assert model.weight.grad is None


def test_a_batch_norm_of_parts_is_refused():
    for norm in (nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()):
        model = nn.Sequential(linear(), norm.double())
        quiet(model, vectors(), epochs=1)
        with pytest.raises(UnsupportedError, match=r"1 is a batch norm .* accumulate > 1"):
            quiet(model, vectors(), epochs=1, accumulate=2)
    quiet(nn.Sequential(linear(), nn.BatchNorm1d(3).double().eval()), vectors(), accumulate=2)


# Schedules


def learning_rates(schedule, epochs):
    rates = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        history = quiet(
            linear(), vectors(count=8), batch_size=4, lr=0.5, schedule=schedule, epochs=epochs
        )
    finally:
        handle.remove()
    assert history.lr == rates[::2]  # two steps an epoch
    return rates


def test_schedules():
    assert learning_rates("constant", 2) == [0.5] * 4
    assert learning_rates("cosine", 2) == pytest.approx(
        [0.5, 0.25 * (1 + math.sqrt(0.5)), 0.25, 0.25 * (1 - math.sqrt(0.5))]
    )
    assert learning_rates("step", 4) == pytest.approx([0.5] * 4 + [0.05] * 2 + [0.005] * 2)
    assert SCHEDULES["cosine"](1.0) == 0


# Seeds


class Noisy(Dataset):
    """Draws from every global generator, as augmentations do."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = torch.randn(4) + random.gauss(0, 1) + float(np.random.normal())
        return (noise + index).double(), index % 3


def noisy_run(seed, data):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()
    quiet(model, data, batch_size=4, lr=0.01, epochs=2, seed=seed)
    return parameters_of(model)


@pytest.mark.parametrize("loader", [False, True])
def test_a_seed_decides_everything(loader):
    own = torch.Generator().manual_seed(9)
    data = DataLoader(Noisy(), 4, shuffle=True, generator=own) if loader else Noisy()
    first = noisy_run(0, data)
    torch.rand(1, generator=own)
    for draw in (torch.rand, np.random.rand, random.seed):
        draw(3)
    assert_equal(noisy_run(0, data), first)
    assert not torch.equal(noisy_run(1, data)["1.weight"], first["1.weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_generators_are_left_alone(fails):
    own = torch.Generator().manual_seed(9)
    data = DataLoader(Noisy(), 4, shuffle=True, generator=own)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()
    before, own_before = generator_states(), own.get_state()
    if fails:
        with pytest.raises(NonFiniteLossError):
            quiet(model, data, loss=lambda logits, targets: logits.sum() * math.nan)
    else:
        quiet(model, data, epochs=1)
    assert generator_states() == before
    assert torch.equal(own.get_state(), own_before)


# Modes


@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_mode_stay(training):
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(4, 3), norm).double().train(training)
    seen = []
    norm.register_forward_hook(lambda module, *args: seen.append(module.training))
    quiet(model, vectors(), epochs=1)
    assert seen and all(mode is training for mode in seen)
    assert model.training is training
    assert norm.running_mean is not None
    assert norm.running_mean.any().item() is training


def test_gradients_are_cleared():
    model = linear()
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    quiet(model, vectors(), epochs=1)
    assert model.weight.grad is None


def test_each_epoch_can_be_watched():
    """What is called after an epoch sees its parameters, and its draws change no other epoch."""
    seen = []

    def watch(history):
        torch.rand(3)
        next(iter(loader))  # draws from the loader's own generator
        assert all(parameter.grad is None for parameter in model.parameters())
        seen.append((len(history.loss), copy.deepcopy(model.state_dict())))

    found = []
    for on_epoch in (None, watch):
        model = linear()
        loader = DataLoader(vectors(), 5, shuffle=True, generator=torch.Generator().manual_seed(1))
        fit(model, loader, epochs=3, lr=0.1, schedule="constant", progress=False, on_epoch=on_epoch)
        found.append(model.state_dict())
    assert_equal(*found)
    assert [epochs for epochs, _ in seen] == [1, 2, 3]
    for epochs, state in seen:
        model = linear()
        loader = DataLoader(vectors(), 5, shuffle=True, generator=torch.Generator())
        fit(model, loader, epochs=epochs, lr=0.1, schedule="constant", progress=False)
        assert_equal(model.state_dict(), state)

    def stop(history):
        raise KeyError(len(history.loss))

    with pytest.raises(KeyError, match="1"):
        fit(linear(), vectors(), epochs=3, progress=False, on_epoch=stop)


# Progress


def test_progress_shows_the_loss_and_can_be_silenced(capsys):
    fit(linear(), vectors(), epochs=2)
    shown = capsys.readouterr().err
    assert "fit" in shown and "loss=" in shown and "2/2" in shown
    quiet(linear(), vectors(), epochs=2)
    fit_head(tiny_vit(), images(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")
