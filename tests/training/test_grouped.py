"""`fit_grouped`: the deltas are those of separate fits, and the anchor runs once for all shards."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import Computes, shaken, swin, vit
from timm.models.convnext import ConvNeXt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from training_cases import generator_states

from tangent_ops import last_blocks, linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.training.fit import fit
from tangent_ops.training.grouped import fit_grouped, forward

CROSS_ENTROPY = nn.CrossEntropyLoss()


def shards(*sizes: int, size: int = 16) -> dict[str, TensorDataset]:
    noise = torch.Generator().manual_seed(1)

    def one(count):
        inputs = torch.randn(count, 3, size, size, generator=noise, dtype=torch.float64)
        return TensorDataset(inputs, torch.randint(5, (count,), generator=noise))

    return {f"s{i}": one(count) for i, count in enumerate(sizes)}


def tangent_of(model: nn.Module, trainable=None, **options):
    tangent = linearize(model.double(), trainable, **options)
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():  # shards start from these deltas, not from zero
        for delta in tangent.deltas().values():
            delta.copy_(0.01 * torch.randn(delta.shape, generator=noise, dtype=delta.dtype))
    return tangent


def separately(tangent, data, **options):
    """Each shard by `fit`, alone, on a copy of the model."""
    found = {}
    for name, shard in data.items():
        own = copy.deepcopy(tangent)
        fit(own, shard, progress=False, **options)
        found[name] = own.delta_dict()
    return found


def assert_equal(found, expected, start, tolerance):
    """Relative to how far the shard's deltas moved."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].meta.shard == name
        assert found[name].keys() == right.keys()
        moved = max(float((right[n] - start[n]).abs().max()) for n in right)
        off = max(float((found[name][n] - right[n]).abs().max()) for n in right)
        assert moved > 0
        assert off <= tolerance * moved


def check(tangent, data, cache=False, **options):
    start = {name: delta.detach().clone() for name, delta in tangent.deltas().items()}
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-2, **options}
    expected = separately(tangent, data, cache=cache, **options)
    found = fit_grouped(tangent, data, cache=cache, progress=False, **options)
    # AdamW divides by |g| + 1e-8: where g is zero but for rounding, 1e-16, as of a key's bias, that
    # is 1e-8 of a step.
    tolerance = 1e-10 if options.get("optimizer") == "sgd" else 3e-8
    assert_equal(found, expected, start, tolerance)
    assert all(torch.equal(tangent.deltas()[name], value) for name, value in start.items())
    assert all(delta.grad is None for delta in tangent.deltas().values())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "schedule": "step", "l2": 0.1, "seed": 3},
        {"optimizer": "adamw", "schedule": "cosine", "l2": 0.1, "loss": CROSS_ENTROPY},
        {"optimizer": "sgd", "schedule": "constant"},
    ],
)
@pytest.mark.parametrize("blocks", [None, 1])
def test_deltas_are_those_of_separate_fits(blocks, options):
    """Sizes with a short last batch, of one step, and of less than a batch."""
    model = vit(depth=2)
    tangent = tangent_of(model, None if blocks is None else last_blocks(model, blocks))
    check(tangent, shards(8, 10, 4, 3), **options)


@pytest.mark.parametrize("blocks", [None, 1])
def test_low_rank_deltas_are_too(blocks):
    model = vit(depth=2)
    trainable = None if blocks is None else last_blocks(model, blocks)
    check(tangent_of(model, trainable, rank=4), shards(8, 6), optimizer="sgd", l2=0.1)


@pytest.mark.parametrize("rank", [None, 4])
def test_cached_features_are_computed_once_for_each_shard(rank):
    model = vit(depth=3)
    tangent = tangent_of(model, last_blocks(model, 1), rank=rank)
    data = shards(8, 10)
    check(tangent, data, cache=True, optimizer="sgd")
    rows = []
    first = tangent.anchor.get_submodule("blocks.0")
    first.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    fit_grouped(tangent, data, cache=True, epochs=3, batch_size=4, progress=False)
    check_of_the_split = 2 * 4  # on the first batch, against the whole model
    assert sum(rows) == 8 + 10 + check_of_the_split


def convnext():
    torch.manual_seed(0)
    return shaken(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5))


@pytest.mark.parametrize("model", [swin, convnext])
def test_other_architectures(model):
    check(tangent_of(model()), shards(4, 6, size=32), epochs=1, optimizer="sgd")


def test_blocks_that_are_repeated_in_separate_fits():
    """A shard that runs alone repeats them, too; those in a group do not."""
    tangent = tangent_of(vit(depth=2))
    tangent.set_grad_checkpointing()
    check(tangent, shards(8, 7), optimizer="sgd")


def head_of(call) -> nn.Module:
    """`call(module, x)`, which has a linear head."""
    torch.manual_seed(5)
    return Computes(call, head=nn.Linear(6, 5))


def test_what_noise_makes_not_finite_is_no_reason_to_refuse():
    data = {n: TensorDataset(s[:][0].square(), s[:][1]) for n, s in vectors(8, 6).items()}
    check(tangent_of(head_of(lambda m, x: m.head(x.sqrt()))), data, optimizer="sgd")


def test_autocast_reaches_the_grouped_products():
    tangent = tangent_of(vit(depth=2), check=False).float()
    start = tangent.delta_dict()
    data = {n: TensorDataset(s[:][0].float(), s[:][1]) for n, s in shards(8, 8).items()}
    options = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "optimizer": "sgd", "amp": True}
    expected = separately(tangent, data, **options)
    seen = set()  # in steps: the check on noise is in full precision
    head = tangent.anchor.get_submodule("head")
    head.register_forward_hook(
        lambda *call: seen.add(call[-1].dtype) if torch.is_autocast_enabled("cpu") else None
    )
    found = fit_grouped(tangent, data, progress=False, **options)
    assert seen == {torch.bfloat16}
    assert_equal(found, expected, start, tolerance=16 * torch.finfo(torch.bfloat16).eps)


def vectors(*sizes: int) -> dict[str, TensorDataset]:
    noise = torch.Generator().manual_seed(6)

    def one(count):
        inputs = torch.randn(count, 6, generator=noise, dtype=torch.float64)
        return TensorDataset(inputs, torch.randint(5, (count,), generator=noise))

    return {f"s{i}": one(count) for i, count in enumerate(sizes)}


def linear_tangent():
    torch.manual_seed(5)
    return tangent_of(nn.Linear(6, 5))


def test_rows_that_see_their_batch_see_their_own_shard_alone():
    mixing = head_of(lambda m, x: m.head((x - x.mean(0)).tanh()))
    tangent = tangent_of(mixing, check=False)  # which one sample leaves at zero
    check(tangent, vectors(8, 7, 4), optimizer="sgd")


class Augmented(Dataset):
    """Random draws from every generator that a data set may use."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + torch.rand(()) + np.random.rand() + random.random(), target


def test_what_a_shard_draws_does_not_depend_on_the_others():
    """The order of its samples and its augmentation, from shared generators or its own."""
    data = {name: Augmented(shard) for name, shard in vectors(7, 9, 8).items()}
    own = torch.Generator()
    loaded = {
        **data,
        "own": DataLoader(data["s0"], 3, shuffle=True, generator=own),
        "shared": DataLoader(data["s1"], 3, shuffle=True, generator=own),
        "in order": DataLoader(data["s2"], 5),
    }
    check(linear_tangent(), loaded, optimizer="sgd", seed=7)


def test_generators_are_put_back():
    own = torch.Generator().manual_seed(11)
    data = vectors(7, 9)
    data["own"] = DataLoader(vectors(6)["s0"], 3, shuffle=True, generator=own)

    def states():
        return own.get_state().tolist(), generator_states()

    tangent = linear_tangent()
    options = {"epochs": 2, "lr": 1e-2, "batch_size": 4, "progress": False}
    before = states()
    first = fit_grouped(tangent, data, **options)
    assert states() == before
    torch.manual_seed(2)
    again = fit_grouped(tangent, data, **options)
    other = fit_grouped(tangent, data, **options, seed=1)
    for name in data:
        assert torch.equal(first[name]["weight"], again[name]["weight"])
        assert not torch.equal(first[name]["weight"], other[name]["weight"])


class Products(TorchDispatchMode):
    """Rows and depth of the plain products, whatever their second factor."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left = args[-2]
            self.found[tuple(left.shape)] += 1
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.found["attention"] += 1
            self.found["attention samples"] += len(args[0])
        return func(*args, **(kwargs or {}))


def test_the_anchor_runs_once_for_all_shards():
    """Frozen blocks: one product a layer, over all rows. Trained: two, of primal and tangent."""
    model = vit(depth=3, global_pool="avg")  # all rows of the last block are read
    tangent = tangent_of(model, last_blocks(model, 1))
    deltas = [dict(tangent.deltas()) for _ in range(3)]
    with torch.no_grad(), Products() as products:
        forward(tangent, deltas, [x for x, _ in (s[:4] for s in shards(4, 4, 4).values())])
    rows, width = 3 * 4 * 17, 48
    frozen, trained = 2, 1
    # qkv, proj and fc1 take the width; fc2 four times that. Tangents' products are batched.
    assert products.found[rows, width] == 3 * frozen + 6 * trained
    assert products.found[rows, 4 * width] == frozen + 2 * trained
    assert products.found["attention"] == frozen
    assert products.found["attention samples"] == frozen * 3 * 4
    anchored = {key for key in products.found if isinstance(key, tuple) and key[1] >= width}
    assert anchored == {(rows, width), (rows, 4 * width), (3 * 4, width)}


def test_no_product_is_computed_twice():
    """As many FLOPs of matrix products as separate passes have."""
    tangent = tangent_of(vit(depth=2, global_pool="avg"), r"^(blocks|norm|head)\.")
    inputs = [shard[:4][0] for shard in shards(4, 4, 4).values()]
    deltas = [{n: p.detach().clone() for n, p in tangent.deltas().items()} for _ in inputs]

    def flops(calls):
        with FlopCounterMode(display=False) as counter:
            for call in calls:
                call()
        return counter.get_total_flops()

    one_by_one = flops(
        lambda d=d, x=x: forward(tangent, [d], [x]) for d, x in zip(deltas, inputs, strict=True)
    )
    together = flops([lambda: forward(tangent, deltas, inputs)])
    assert 0 < together == one_by_one


MASKS = {
    "shared": lambda x: torch.ones(6, 6, dtype=torch.bool).tril(),
    "of samples": lambda x: (x > -1)[:, None, None],
    "of tokens": lambda x: x.mean(0).expand(6, 6),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_frozen_attention(kind):
    """Below a trained head."""

    def call(m, x):
        tokens = x[:, None, :, None] * torch.ones(6, dtype=x.dtype)
        mask = MASKS[kind](x)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)
        return m.head(mixed.mean((1, 2)))

    check(tangent_of(head_of(call)), vectors(6, 5), optimizer="sgd")


class Diverging(nn.Module):
    def forward(self, logits, targets):
        loss = F.cross_entropy(logits, targets)
        return loss / 0 if len(targets) == 3 else loss


def test_a_loss_that_is_not_finite_names_its_shard():
    data = vectors(4, 3)
    data["broken"] = TensorDataset(torch.full((4, 6), torch.nan).double(), torch.zeros(4).long())
    tangent = linear_tangent()
    before = tangent.delta_dict()
    with pytest.raises(NonFiniteLossError, match="shard 'broken'"):
        fit_grouped(tangent, data, progress=False)
    with pytest.raises(NonFiniteLossError, match="shard 's1'"):
        fit_grouped(tangent, vectors(4, 3), loss=Diverging(), progress=False)
    assert all(torch.equal(tangent.deltas()[name], value) for name, value in before.items())


def remembering(m, x):
    """The result depends on the number of calls before."""
    m.calls = getattr(m, "calls", 0) + 1
    return m.head(x) * m.calls


def branching(m, x):
    return m.head(x) if x.sum() > 0 else -m.head(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [(remembering, "tried on noise"), (branching, "torch.func.vmap cannot run")],
)
def test_models_that_cannot_be_grouped_are_refused(call, message):
    with pytest.raises(UnsupportedError, match=message):
        fit_grouped(tangent_of(head_of(call), check=False), vectors(4, 4), progress=False)


SOME = vectors(4)["s0"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({}, {}, "got none"),
        ([vectors(4)["s0"]], {}, "got a list"),
        ({"a": SOME, "b": SOME}, {}, "'a' and 'b' are the same data"),
        ({"a": SOME, "b": vectors(0)["s0"]}, {}, "shard 'b': data is empty"),
        ({"a": [1, 2]}, {}, "shard 'a': data must be"),
        ({"a": TensorDataset(torch.ones(4, 6))}, {}, "shard 'a': data must yield"),
        ({3: SOME}, {}, "must be a string, got 3"),
        ({"a": SOME}, {"optimizer": "adam"}, "optimizer must be"),
        ({"a": SOME}, {"cache": "folder"}, "cache must be True or False"),
        ({"a": SOME}, {"loss": lambda y, t: y}, "loss must return a scalar"),
        ({"a": SOME}, {"loss": lambda y, t: y.detach().sum()}, "loss does not depend"),
    ],
)
def test_bad_arguments(data, options, message):
    with pytest.raises(ArgumentError, match=message):
        fit_grouped(linear_tangent(), data, progress=False, **options)


def test_bad_models():
    frozen, trained = linear_tangent(), linear_tangent()
    for delta in frozen.deltas().values():
        delta.requires_grad_(False)
    trained.anchor.weight.requires_grad_(True)
    for model, message in (
        (nn.Linear(6, 5), "must be a LinearizedModel"),
        (frozen, "no trainable deltas"),
        (trained, "share the anchor"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fit_grouped(model, {"a": SOME}, progress=False)


def test_float16_and_models_without_a_trunk_are_refused():
    with pytest.raises(UnsupportedError, match="float16"):
        fit_grouped(linear_tangent().half(), vectors(4), progress=False)
    with pytest.raises(UnsupportedError):
        fit_grouped(linear_tangent(), vectors(4), cache=True, progress=False)


def test_deltas_that_are_not_trained_stay():
    tangent = tangent_of(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    tangent.deltas()["0.bias"].requires_grad_(False)
    check(tangent, vectors(8, 6), optimizer="sgd")
