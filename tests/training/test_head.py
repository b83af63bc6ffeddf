"""`fit_head`: a linear probe against a linear model on features computed apart."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from training_cases import assert_equal, generator_states, images, quiet, tiny_vit, vectors

from tangent_ops import accuracy, fit_head, last_blocks, linearize, predict
from tangent_ops.errors import ArgumentError, UnsupportedError


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "token"},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "token", "reg_tokens": 2, "drop_rate": 0.5},
    ],
)
def test_a_probe_is_a_linear_model_on_the_pooled_features(options):
    model, data = tiny_vit(**options), images()
    state = copy.deepcopy(model.state_dict())
    training = {"epochs": 3, "batch_size": 8, "lr": 0.05, "seed": 7, "l2": 0.01}
    probe, history = fit_head(model, data, progress=False, **training)

    backbone = tiny_vit(**options)
    backbone.reset_classifier(0)  # now the model's output is the pooled features
    features = predict(backbone, data)
    head = nn.Linear(24, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    expected = quiet(head, TensorDataset(features, data.tensors[1]), **training)

    assert history.loss == pytest.approx(expected.loss, rel=1e-5)
    assert history.loss[-1] < history.loss[0]
    with torch.no_grad():
        assert torch.allclose(predict(probe, data), head(features), atol=1e-4)
    assert not probe.training
    assert_equal(model.state_dict(), state)
    for name, value in probe.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, state[name])


def test_a_probe_starts_from_zero():
    probe, history = fit_head(tiny_vit(), images(), lr=1e-12, epochs=1, progress=False)
    assert probe.get_parameter("head.weight").abs().max() < 1e-9
    assert history.loss == pytest.approx([15**2 / 5])


def test_a_probe_computes_features_once():
    def forwards(epochs):
        model, count = tiny_vit(), []
        model.patch_embed.register_forward_hook(lambda *args: count.append(1))
        fit_head(model, images(), epochs=epochs, progress=False)
        return len(count)

    assert forwards(epochs=5) == forwards(epochs=1) > 0


def test_a_probe_may_have_other_classes():
    data = images()
    data = TensorDataset(data.tensors[0], data.tensors[1] % 2)
    probe, _ = fit_head(tiny_vit(), data, num_classes=2, epochs=1, progress=False)
    assert probe(data.tensors[0]).shape == (20, 2)
    headless = tiny_vit()
    headless.reset_classifier(0)
    probe, _ = fit_head(headless, data, num_classes=2, epochs=1, progress=False)
    assert probe(data.tensors[0]).shape == (20, 2)
    with pytest.raises(ArgumentError, match="pass num_classes"):
        fit_head(headless, data)
    with pytest.raises(ArgumentError, match="class indices from 0 to 1"):
        fit_head(tiny_vit(), images(), num_classes=2, progress=False)


def test_a_frozen_model_gets_a_probe():
    model = tiny_vit().requires_grad_(False)
    probe, history = fit_head(model, images(), epochs=2, progress=False)
    assert history.loss[1] < history.loss[0]
    trained = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}


def test_a_probe_leaves_the_callers_generators_alone():
    model = tiny_vit()
    before = generator_states()
    fit_head(model, images(), num_classes=5, epochs=1, progress=False)
    assert generator_states() == before


@pytest.mark.parametrize("options", [{"epochs": 0}, {"num_classes": -1}, {"num_classes": 2.0}])
def test_a_probe_refuses_options_before_any_work(options):
    model = tiny_vit()
    model.patch_embed.register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    with pytest.raises(ArgumentError, match=next(iter(options))):
        fit_head(model, images(), **options)


def test_a_probe_needs_a_model_with_one_linear_classifier():
    with pytest.raises(UnsupportedError, match=r"Linear has no known classifier"):
        fit_head(nn.Linear(4, 3), vectors())
    model = tiny_vit()
    model.set_submodule("head", nn.Sequential(nn.Linear(24, 5)))
    with pytest.raises(UnsupportedError, match=r"one nn\.Linear .* has a Sequential"):
        fit_head(model, images())


def test_the_recipe_probe_first_then_the_last_block():
    data = images()
    probe, _ = fit_head(tiny_vit(), data, epochs=10, progress=False)
    tangent = linearize(probe, last_blocks(probe, 1))
    history = quiet(tangent, data, epochs=20, lr=1e-2, cache=True)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert accuracy(tangent, data) > accuracy(probe, data)
