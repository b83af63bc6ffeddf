"""The error for a missing derivative names the operation, at linearize or at a call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import VIT, Computes, NoJvp, family, generator, levit
from torch import Tensor, nn

from tangent_ops import LinearizedModel, linearize
from tangent_ops.errors import NoGradientWarning, UnsupportedError


def sampled(x: Tensor) -> Tensor:
    return F.grid_sample(x.view(-1, 1, 2, 4), torch.zeros(len(x), 3, 3, 2), align_corners=False)


def calling(call) -> nn.Module:
    return Computes(lambda _, x: call(x))


def model_of(call) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), calling(call)))


X = torch.randn(3, 4, generator=generator(1))
LACKING = {
    "an operation": (
        sampled,
        r"grid_sampler_2d has no forward-mode .*; Computes calls it, as 1\.1\.",
    ),
    "a Function": (
        NoJvp.apply,
        r"NoJvp, a torch\.autograd\.Function.*; Computes calls it, as 1\.1",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_missing_forward_derivative_at_linearize_and_at_a_call(name):
    call, message = LACKING[name]
    model = model_of(call)
    for example in (X, (X,)):
        with pytest.raises(UnsupportedError, match=message):
            linearize(model, example=example)
    tangent = linearize(model)
    with pytest.raises(UnsupportedError, match=message) as raised:
        tangent(X)
    assert isinstance(raised.value.__cause__, NotImplementedError)


def test_a_missing_derivative_of_the_tangent_is_found_too():
    model = model_of(torch.ops.aten.hardsigmoid)  # not F's, which is routed
    with pytest.raises(UnsupportedError, match="hardsigmoid_backward, in the backward pass"):
        linearize(model, example=X)


def test_only_what_is_trained_needs_derivatives():
    model = nn.Sequential(model_of(sampled), nn.Flatten(), nn.Linear(9, 2))
    linearize(model, "^2", example=X)(X)
    with pytest.raises(UnsupportedError, match="grid_sampler_2d"):
        linearize(model, "^0", example=X)


def test_timm_describes_its_own_input(capfd):
    model = family("vit_tiny_patch16_224", depth=1)
    model.norm = calling(NoJvp.apply)
    with pytest.raises(UnsupportedError, match="Computes calls it, as norm"):
        linearize(model)
    # The described size does not fit these models, so nothing is checked or printed.
    for model in (family("vit_tiny_patch16_224", **VIT), levit()):
        model.norm = calling(NoJvp.apply)
        linearize(model)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * float(x.sum()),  # reads values
        lambda x: x.view(-1, 7),  # a real error
        lambda x: torch.from_numpy(x.numpy()),
    ],
)
def test_other_errors_are_left_to_the_call(call):
    assert isinstance(linearize(model_of(call), example=X), LinearizedModel)


def test_neither_model_nor_random_numbers_change():
    torch.manual_seed(0)
    calls = []
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), calling(torch.rand_like))
    model = nn.Sequential(*layers, calling(lambda x: calls.append(type(x)) or x.mul_(2)))
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.warns(NoGradientWarning):  # random numbers depend on nothing
        linearize(model, example=X)
    assert calls
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_the_way_back_starts_after_the_forward_level():
    """Within the level, products of this model's gates would pass dual cotangents to SiLU."""
    assert linearize(family("efficientvim_m1")).deltas()
