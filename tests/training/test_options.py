"""`Recipe`: its ranges, and how recipes and keywords reach the functions that train."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tangent_ops import History, Recipe, fit, fit_grouped, fit_head, linearize
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.training.head import PROBE
from tangent_ops.training.options import RecipeOptions, recipe_of

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.arange(6) % 3)


def weights(recipe=None, **options):
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    fit(model, DATA, recipe, progress=False, **options)
    return model.weight.detach()


def test_keywords_replace_the_recipes_fields():
    recipe = Recipe(epochs=2, lr=0.1, optimizer="sgd", seed=3, batch_size=2)
    alone = weights(recipe)
    assert alone.any()
    assert torch.equal(alone, weights(epochs=2, lr=0.1, optimizer="sgd", seed=3, batch_size=2))
    assert torch.equal(weights(recipe, epochs=1), weights(dataclasses.replace(recipe, epochs=1)))
    assert not torch.equal(weights(recipe, epochs=1), alone)
    assert recipe.epochs == 2


def test_a_history_in_a_line():
    history = History([4.0, 2.0, 1.0], [0.1, 0.1, 0.1], steps=9, seconds=0.25)
    assert repr(history) == "History(3 epochs, 9 steps, 0.2 s, loss 4 to 1)"
    assert repr(History()) == "History(0 epochs, 0 steps, 0.0 s)"


def test_the_keywords_of_editors_are_the_fields():
    assert [*RecipeOptions.__annotations__] == [field.name for field in dataclasses.fields(Recipe)]


def test_a_probe_alone_has_another_rate():
    assert dataclasses.replace(PROBE, lr=Recipe.lr) == Recipe()
    assert recipe_of(fit_head, None, {"epochs": 2}, PROBE) == Recipe(lr=1e-2, epochs=2)
    assert recipe_of(fit_head, Recipe(), {}, PROBE).lr == Recipe.lr


def test_losses_by_name():
    assert Recipe() == Recipe(loss=None) == Recipe(loss="rsl")
    assert isinstance(Recipe().loss_function, RescaledSquareLoss)
    own = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert Recipe(loss=own).loss_function is own
    options = {"lr": 0.1, "epochs": 1}
    named = weights(loss="cross-entropy", **options)
    assert torch.equal(named, weights(loss=nn.CrossEntropyLoss(), **options))
    assert not torch.equal(named, weights(**options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights(epoch=5), "fit has no option 'epoch': did you mean epochs?"),
        (lambda: weights(devise="cpu"), "fit has no option 'devise': did you mean device?"),
        (lambda: weights(x=5), "'x'; there are loss, epochs, .*, cache, progress, on_epoch$"),
        (lambda: weights(5), "recipe must be a Recipe, got 5"),
        (lambda: fit_head(nn.Linear(4, 3), DATA, num_class=3), "did you mean num_classes?"),
        (
            lambda: fit_grouped(linearize(nn.Linear(4, 3)), {"a": DATA}, accumulate=2),
            "fit_grouped does not use the recipe's accumulate: give a smaller batch_size",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"loss": "l1"}, r"loss must be one of \['rsl', 'cross-entropy'\] or a function"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 1, got 1.5"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"lr": "1"}, "lr must be positive and finite, got '1'"),
        ({"l2": -1e-3}, "l2 must be finite and not negative, got -0.001"),
        ({"l2": "1"}, "l2 must be finite and not negative, got '1'"),
        ({"optimizer": "adam"}, r"one of \['adamw', 'sgd', 'momentum'\], got 'adam'"),
        ({"schedule": "linear"}, "schedule must be one of .*'step'.*, got 'linear'"),
        ({"schedule": None}, "schedule must be one of"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"amp": "no"}, "amp must be True, False or None, got 'no'"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1, got 0"),
    ],
)
def test_ranges(field, message):
    with pytest.raises(ArgumentError, match=message):
        Recipe(**field)
