"""`find_lr`: the losses of a rising rate, the stability limit, and that all is put back."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_cases import (
    assert_equal,
    generator_states,
    images,
    linear,
    parameters_of,
    tiny_vit,
    vectors,
)

from tangent_ops import Recipe, find_lr, last_blocks, linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.training import lr_range
from tangent_ops.training.lr_range import LrRange

QUIET = {"progress": False}
BETA = 0.9  # the momentum of "sgd"


def regression(l2=0.3):
    """min_W mean (XW - Y)^2 + l2/2 |W|^2: data, gradient, objective, and the Hessian's largest."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 3))

    def gradient(w):
        return 2 * x.T @ (x @ w - y) / y.size + l2 * w

    def objective(w):
        return ((x @ w - y) ** 2).mean() + l2 / 2 * (w**2).sum()

    top = np.linalg.eigvalsh(2 * x.T @ x / y.size + l2 * np.eye(4))[-1]
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), gradient, objective, top


def whole_batch(low, high, steps, l2=0.3):
    data, *_ = regression(l2)
    options = {"loss": F.mse_loss, "l2": l2, "optimizer": "sgd", "batch_size": 12}
    model = linear(bias=False)
    found = find_lr(model, data, low=low, high=high, steps=steps, **options, **QUIET)
    return model.weight.detach().numpy().T, found


def test_losses_are_those_of_gradient_descent_with_momentum():
    _, gradient, objective, top = regression()
    w, found = whole_batch(0.01 / top, 3 / top, 40)
    velocity, expected = np.zeros_like(w), []
    for lr in np.geomspace(0.01 / top, 3 / top, 40):
        expected.append(objective(w))
        velocity = BETA * velocity + gradient(w)
        w = w - lr * velocity
    assert np.allclose(found.losses, expected, rtol=1e-9)
    assert np.allclose(found.lrs, np.geomspace(0.01 / top, 3 / top, 40))
    assert found.smoothed[20] == pytest.approx(np.mean(expected[18:23]))
    assert found.smoothed[0] == pytest.approx(np.mean(expected[:3]))


def test_the_training_diverges_where_dense_algebra_says():
    """Without an l2 that hides it, the loss falls below 2 (1 + β) / λ_max and explodes above."""
    limit = 2 * (1 + BETA) / regression()[-1]
    _, below = whole_batch(0.8 * limit, 0.99 * limit, 200)
    _, above = whole_batch(1.03 * limit, 1.2 * limit, 200)
    assert len(below.lrs) == 200 and below.losses[-1] < below.losses[0]
    assert len(above.lrs) < 200 and above.losses[-1] > 4 * min(above.losses)


def test_the_suggestion_is_where_the_loss_falls_fastest():
    lrs = np.geomspace(1e-6, 1.0, 61)
    falls = 10 - 8 / (1 + np.exp(-3 * np.log(lrs / 1e-3)))  # steepest at 1e-3
    diverges = falls + 1e4 * np.maximum(0, lrs - 0.1) ** 2
    comes_back = falls + 50.0 * ((lrs > 0.1) & (lrs < 0.5)) + (lrs > 0.5)  # falls by 50, too late
    for losses in (falls, diverges, comes_back):
        assert LrRange(lrs, losses, losses).suggestion == pytest.approx(1e-3)
    assert LrRange(lrs, falls[::-1], falls[::-1]).suggestion is None
    assert "suggestion 0.001" in repr(LrRange(lrs, falls, falls))


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_mini_batches_are_read_epoch_after_epoch(optimizer):
    """Against a loop of PyTorch's own, with parts of batches."""
    data = vectors(10)
    model, own = linear(), linear()
    lrs = np.geomspace(1e-4, 1e-2, 10)
    torch.manual_seed(5)
    if optimizer == "adamw":
        made = torch.optim.AdamW(own.parameters(), weight_decay=0.0)
    else:
        made = torch.optim.SGD(own.parameters(), momentum=0.9)
    loader, expected = DataLoader(data, batch_size=4, shuffle=True), []
    while len(expected) < 10:  # epochs of three batches
        for x, y in loader:
            if len(expected) == 10:
                break
            made.param_groups[0]["lr"] = lrs[len(expected)]
            loss = F.cross_entropy(own(x), y)
            expected.append(loss.item())
            made.zero_grad()
            loss.backward()
            made.step()
    options = {"loss": "cross-entropy", "batch_size": 4, "optimizer": optimizer, "seed": 5}
    recipe = Recipe(lr=3.0, epochs=2, schedule="step", **options)  # these three are fit's own
    rates = {"low": 1e-4, "high": 1e-2, "steps": 10}
    found = find_lr(model, data, recipe, accumulate=2, **rates, **QUIET)
    assert np.allclose(found.losses, expected, rtol=1e-9)


class Interrupted(TensorDataset):
    """Raises at the fifteenth sample that is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 15:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("how", ["whole", "diverges", "interrupted"])
def test_everything_is_put_back_bit_for_bit(how):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    model.double().train()
    model[2].eval()
    model(torch.randn(5, 4).double()).sum().backward()
    data = vectors()
    if how == "interrupted":
        data = Interrupted(*data.tensors)
    order = torch.Generator().manual_seed(9)
    loader = DataLoader(data, 4, shuffle=True, generator=order)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: g.clone() for name, g in gradients.items() if g is not None}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = generator_states(), order.get_state().tolist()
    rates = {"low": 1e-3, "high": 1e6 if how == "diverges" else 1e-2, "steps": 20}
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            find_lr(model, loader, **rates, **QUIET)
    else:
        found = find_lr(model, loader, optimizer="sgd", **rates, **QUIET)
        assert (len(found.lrs) < 20) == (how == "diverges")
        assert len(set(found.losses)) > 5
    assert_equal(model.state_dict(), before)
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, values)
    assert modes == [module.training for module in model.modules()]
    assert states == (generator_states(), order.get_state().tolist())


def test_a_tangent_model_with_cached_blocks():
    model = tiny_vit().double()
    tangent = linearize(model, last_blocks(model, 1))
    before = parameters_of(tangent)
    rates = {"low": 1e-5, "high": 1e-2, "steps": 10, "batch_size": 8, "seed": 2}
    plain = find_lr(tangent, images(dtype=torch.float64), **rates, **QUIET)
    cached = find_lr(tangent, images(dtype=torch.float64), cache=True, **rates, **QUIET)
    assert np.allclose(plain.losses, cached.losses, rtol=1e-9)
    assert plain.losses[0] > plain.losses[-1]
    assert_equal(parameters_of(tangent), before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": 0.0}, ArgumentError, "0 < low < high"),
        ({"low": 2.0, "high": 1.0}, ArgumentError, "got 2.0 and 1.0"),
        ({"high": math.inf}, ArgumentError, "0 < low < high"),
        ({"low": "1e-3"}, ArgumentError, "0 < low < high"),
        ({"steps": 9}, ArgumentError, "steps must be an integer of at least 10"),
        ({"lr": 1e-3}, ArgumentError, "does not use the recipe's lr: find_lr raises the rate"),
        ({"epochs": 3}, ArgumentError, "low to high in so many steps"),
        ({"rate": 1.0}, ArgumentError, "no option 'rate'"),
        ({"recipe": "sgd"}, ArgumentError, "must be a Recipe"),
        ({"cache": True}, ArgumentError, "cache needs a LinearizedModel"),
    ],
)
def test_refusals_come_before_any_step(options, error, words):
    data = Interrupted(*vectors().tensors)
    with pytest.raises(error, match=words):
        find_lr(linear(), data, **options, **QUIET)
    assert data.reads == 0


def test_data_that_gives_no_loss():
    x, y = vectors().tensors
    model = linear()
    with pytest.raises(NonFiniteLossError, match="before the first step"):
        find_lr(model, TensorDataset(x * math.nan, y), **QUIET)
    with pytest.raises(ArgumentError, match="no trainable parameters"):
        find_lr(linear().requires_grad_(False), vectors(), **QUIET)
    with pytest.raises(UnsupportedError, match="find_lr in float16"):
        find_lr(linear().half(), vectors(), **QUIET)


def test_a_loss_that_overflows_ends_the_test():
    model, data = linear().float(), vectors(dtype=torch.float32)
    found = find_lr(model, data, low=1e-3, high=1e300, steps=10, optimizer="sgd", **QUIET)
    assert 2 <= len(found.lrs) == len(found.losses) == len(found.smoothed) < 10
    assert np.isfinite(found.losses).all()


def test_a_group_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(lr_range, "Group", lambda device: SimpleNamespace(world=2))
    with pytest.raises(UnsupportedError, match="in one process before the group starts"):
        find_lr(linear(), vectors(), **QUIET)


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra for plots is not installed")
    from readable_pictures import assert_readable

    from tangent_ops import pictures
    from tangent_ops.training.lr_range import _draw

    found = find_lr(linear(), vectors(), low=1e-4, high=100.0, **QUIET)
    path = found.plot(tmp_path / "lr.png")
    first = path.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and found.plot(path).read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["lr.png"]
    with pictures.styled():
        assert_readable(_draw(found))
    with pytest.raises(ArgumentError, match="folder that does not exist"):
        found.plot(tmp_path / "none" / "lr.png")
