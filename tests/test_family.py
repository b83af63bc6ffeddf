"""The family protocol, and the table of docs/models.md."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import hugging_face as hf
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tangent_ops import Family, cache_features, fit, fit_head, last_blocks, linearize, predict
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.family import block_names, family_of, heads_of
from tangent_ops.model.features import split_model

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


class Odd(nn.Module):
    """Blocks, head and logits where no known name is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return {"features": x, "scores": self.out(x)}


class OddFamily:
    def blocks(self, model: Any) -> Any:
        return model.steps

    def head(self, model: Any) -> Any:
        return model.out

    def logits(self, output: Any) -> Any:
        return output["scores"]


def odd() -> Odd:
    model = Odd()
    model.tangent_family = OddFamily()
    return model


def data() -> TensorDataset:
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, torch.arange(12) % 3)


def test_a_family_of_ones_own() -> None:
    model = odd()
    assert isinstance(OddFamily(), Family)
    assert last_blocks(model, 2) == r"^(steps\.1|steps\.2|out)\."
    tangent = linearize(model, last_blocks(model, 1))
    assert tangent.tangent_family is not None and "out.weight" in tangent.deltas()
    history = fit(tangent, data(), epochs=3, lr=1e-2, progress=False)
    cached = linearize(model, last_blocks(model, 1))
    again = fit(cached, data(), epochs=3, lr=1e-2, progress=False, cache=True)
    assert again.loss == pytest.approx(history.loss)
    inputs = data().tensors[0]
    torch.testing.assert_close(predict(tangent, data()), tangent(inputs)["scores"].detach())


def test_the_family_goes_where_the_model_goes() -> None:
    model = odd()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(family_of(other), OddFamily)
    tangent = pickle.loads(pickle.dumps(linearize(model)))
    assert torch.equal(predict(tangent, data()), predict(model, data()))
    probe: Any = fit_head(model, data(), epochs=1, progress=False)[0]
    assert probe.out.weight.any()


def test_a_model_without_blocks_or_logits_says_what_to_do() -> None:
    model = Odd()
    with pytest.raises(UnsupportedError, match=r"set model\.tangent_family to a tangent_ops"):
        last_blocks(model, 1)
    with pytest.raises(UnsupportedError, match=r"a dict of \['features', 'scores'\], without logi"):
        fit(linearize(model), data(), progress=False)
    model.tangent_family = "odd"
    with pytest.raises(ArgumentError, match="tangent_family is 'odd': expected an object with"):
        last_blocks(model, 1)
    model.tangent_family = OddFamily()
    model.tangent_family.blocks = lambda model: [nn.Linear(2, 2)]
    with pytest.raises(ArgumentError, match="returns a Linear that is no module of the model"):
        last_blocks(model, 1)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
        self.image = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})


def test_two_towers_have_no_last_blocks() -> None:
    with pytest.raises(UnsupportedError, match="TwoTowers has 2 lists of blocks"):
        last_blocks(TwoTowers(), 1)


class HeadTwice(Odd):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = super().forward(x)
        return {**output, "scores": 2 * output["scores"]}


def test_a_head_that_does_not_return_the_logits_is_no_probe() -> None:
    model = HeadTwice()
    model.tangent_family = OddFamily()
    with pytest.raises(UnsupportedError, match="logits of HeadTwice are not its classifier's outp"):
        fit_head(model, data(), progress=False)


class AddsOutside(Odd):
    """Adds a block's input outside of the block, so that the next one's input is more."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        for step in self.steps:
            x = x + step(x)
        return {"features": x, "scores": self.out(x)}


class ReadsItsInput(Odd):
    """What follows the blocks reads the input: the tokens are not enough."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = super().forward(x)
        return {**output, "scores": output["scores"] * x[:, :1]}


@pytest.mark.parametrize("kind", [AddsOutside, ReadsItsInput])
def test_a_model_that_needs_more_than_the_tokens_cannot_be_split(kind: type[Odd]) -> None:
    model = kind()
    model.tangent_family = OddFamily()
    trunk, _ = linearize(model, last_blocks(model, 1)).split()
    with pytest.raises(UnsupportedError, match="in a row do not give what the model gives"):
        cache_features(trunk, DataLoader(data(), 4), progress=False)


class Scaled(Odd):
    """Has a parameter of its own, which the part after the blocks reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = super().forward(x)
        return {**output, "scores": self.scale * output["scores"]}


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch 2.11's own
def test_a_split_model_is_cast_as_a_whole() -> None:
    model, inputs = Scaled(), data().tensors[0]
    model.tangent_family = OddFamily()
    trunk, tail = split_model(model, 2)
    tokens = trunk(inputs)
    expected = copy.deepcopy(model).double()(inputs.double())["scores"]
    found = copy.deepcopy(tail).double()(tokens.double())["scores"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    names = [name for name, _ in tail.named_parameters()]
    assert "scale" in names and "steps.2.0.weight" in names and "steps.1.0.weight" not in names
    with pytest.raises(ArgumentError, match="a tail runs after its trunk"):
        split_model(model, 1)[1](tokens)


class ByLength(nn.Module):
    """Reads the last token that is not zero, as models of texts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.classifier = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        last = (ids != 0).sum(1) - 1
        return self.classifier(x[torch.arange(len(x)), last])


def test_texts_are_compared_with_the_whole_model_in_every_batch() -> None:
    """The first batch has full texts, so only later ones show that lengths are read."""
    ids = torch.randint(1, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    ids[6:, 3:] = 0
    model = ByLength()
    trunk, _ = linearize(model, last_blocks(model, 1)).split()
    full = TensorDataset(ids[:6], torch.zeros(6))
    assert len(cache_features(trunk, DataLoader(full, 3), progress=False)) == 6
    some = TensorDataset(ids, torch.zeros(8))
    with pytest.raises(UnsupportedError, match="in a row do not give what the model gives"):
        cache_features(trunk, DataLoader(some, 3), progress=False)


def table() -> dict[str, list[str]]:
    rows = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


@pytest.mark.filterwarnings("ignore::tangent_ops.errors.NoGradientWarning")
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_table_of_the_page_is_what_is_so(family: str) -> None:
    model = hf.made(family)
    blocks, heads, probe, cache, _grouped = table()[type(model).__name__]
    names = list(block_names(model))
    assert names == [f"{re.findall('`(.*?)`', blocks)[0]}.{i}" for i in range(3)]
    modules = {id(module): name for name, module in model.named_modules()}
    assert re.findall("`(.*?)`", heads) == [modules[id(head)] for head in heads_of(model)]
    assert (probe == "yes") == (len(heads_of(model)) == 1)
    trunk, tail = linearize(model, last_blocks(model, 1), check=False).split()
    fields = hf.inputs(family, 3)
    if cache == "yes":
        torch.testing.assert_close(tail(trunk(**fields)).logits, model(**fields).logits)
    else:
        with pytest.raises(UnsupportedError, match="mask of padding"):
            trunk(**fields)
    assert len(table()) == len(hf.FAMILIES)
