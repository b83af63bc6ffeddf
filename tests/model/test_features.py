"""Splitting a transformer, and caching the output of its frozen part."""

from __future__ import annotations

import copy
import multiprocessing

import numpy as np
import pytest
import torch
from small_models import (
    VIT,
    Computes,
    assert_near,
    exact_jvp,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    vit,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tangent_ops import CachedFeatures, cache_features, last_blocks, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.features import split_model

SPLITTABLE = {
    "plain": ("vit_small_patch16_224", VIT),
    "average": ("vit_small_patch16_224", {**VIT, "global_pool": "avg", "reg_tokens": 2}),
    "map": ("vit_small_patch16_224", {**VIT, "global_pool": "map", "qk_norm": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# --- split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITTABLE)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_tail_of_trunk_is_the_tangent_model(name, k):
    architecture, options = SPLITTABLE[name]
    model, x = family(architecture, **options), images()
    tangent = moved(linearize(model, last_blocks(model, k)))
    trunk, tail = tangent.split()
    tokens = trunk(x)
    assert not tokens.requires_grad
    assert_near(tail(tokens), tangent(x), 1e-6)
    assert_near(tail.primal_and_tangent(tokens), exact_jvp(model, tangent.deltas(), x))
    assert hooks(tangent.anchor) == 0


def test_trunk_stops_at_the_first_trained_block():
    model = vit()
    tangent = linearize(model, last_blocks(model, 1))
    trunk, _ = tangent.split()
    ran = []
    trunk(images())  # the first batch also runs the tail, as a check
    for index, block in enumerate(tangent.anchor.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    trunk(images())
    assert ran == [0, 1]


def test_tail_shares_the_deltas_and_keeps_the_whole_models_record():
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 2)))
    trunk, tail = tangent.split()
    shared = tail.deltas()
    assert shared.keys() == tangent.deltas().keys()
    assert all(shared[n] is delta for n, delta in tangent.deltas().items())
    assert {id(p) for p in tail.parameters() if p.requires_grad} == {
        id(delta) for delta in tangent.deltas().values()
    }

    cotangent = torch.randn(2, 5, generator=generator(4))
    tail(trunk(x)).backward(cotangent)
    gradients = exact_vjp(model, list(shared), cotangent, x)
    name = "blocks.1.attn.qkv.weight"
    assert_near(tangent.deltas()[name].grad, gradients[name])

    before = tangent(x)
    torch.optim.SGD(shared.values(), lr=0.1).step()
    assert not torch.allclose(tangent(x), before)
    assert_near(tangent(x), sum(exact_jvp(model, tangent.deltas(), x)))

    assert tail.fingerprint == tangent.fingerprint
    assert (tail.trainable, tail.model_name) == (tangent.trainable, tangent.model_name)
    fresh = linearize(model, last_blocks(model, 2))
    fresh.load_delta_dict(tail.delta_dict())
    assert torch.equal(fresh(x), tangent(x))
    assert not any(module.training for module in tail.train().anchor.modules())


def test_deepcopy_of_both_parts_stays_whole():
    model, x = vit(), images()
    trunk, tail = copy.deepcopy(moved(linearize(model, last_blocks(model, 1))).split())
    tokens = trunk(x)
    before = tail(tokens)
    with torch.no_grad():
        tail.anchor.get_parameter("head.bias").add_(1)
    assert_near(tail(tokens), before + 1, 1e-6)


@pytest.mark.parametrize(
    ("trainable", "named"),
    [(None, "cls_token"), ("patch_embed.proj.bias|head", r"patch_embed\.proj\.bias")],
)
def test_trained_below_the_blocks(trainable, named):
    tangent = linearize(vit(), trainable)
    with pytest.raises(UnsupportedError, match=rf"{named} is trained\. Train without a feature c"):
        tangent.split()


class BetweenBlocksAndNorm(nn.Module):
    """Computes something outside of blocks, norm and forward_head."""

    def __init__(self, norm_first: bool = False):
        super().__init__()
        torch.manual_seed(5)
        if norm_first:
            self.norm = nn.LayerNorm(4)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if not norm_first:
            self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward_head(self, x):
        return self.head(x)

    def forward(self, x):
        return self.forward_head(self.norm(self.blocks(self.embed(x)).square()))


class SkipsItsBlocks(BetweenBlocksAndNorm):
    def forward(self, x):
        return self.head(self.embed(x))


class TwoOutputs(BetweenBlocksAndNorm):
    def forward(self, x):
        tokens = self.blocks(self.embed(x))
        return self.forward_head(self.norm(tokens)), tokens


def test_models_that_cannot_be_split():
    with pytest.raises(UnsupportedError, match=r"ResNet has no `blocks`"):
        linearize(family("test_resnet"), "fc").split()
    for model in (family("test_efficientnet"), BetweenBlocksAndNorm(norm_first=True)):
        with pytest.raises(UnsupportedError, match="in front of its first block: no block is fro"):
            split_model(model, 0)
    for start in (-1, 4):
        with pytest.raises(ArgumentError, match=rf"start={start}: expected 0 to 3"):
            split_model(vit(), start)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BetweenBlocksAndNorm(), "in a row do not give what the model gives"),
        (TwoOutputs(), "in a row do not give what the model gives"),
        (SkipsItsBlocks(), "skips its own blocks"),
    ],
)
def test_what_the_first_batch_finds(model, message):
    trunk, _ = split_model(model.train(), 1)
    for _ in range(2):  # the second batch raises again
        with pytest.raises(UnsupportedError, match=message):
            trunk(torch.randn(5, 3, generator=generator(6)))
        assert hooks(model) == 0
        assert all(module.training for module in model.modules())


def test_blocks_that_take_more_than_tokens():
    model, x = family("eva02_tiny_patch14_224", **{**VIT, "depth": 2}), images()
    trunk, _ = linearize(model, last_blocks(model, 1)).split()
    with pytest.raises(UnsupportedError, match=r"blocks take more than the tokens.*rope"):
        trunk(x)
    assert hooks(trunk) == 0
    # Behind the last block there are only tokens.
    tangent = moved(linearize(model, last_blocks(model, 0)))
    trunk, tail = tangent.split()
    assert_near(tail(trunk(x)), tangent(x), 1e-6)


def test_an_error_of_the_model_leaves_no_hook():
    model = vit()
    trunk, _ = split_model(model.train(), 1)
    with pytest.raises(Exception, match=r"expected|shape|channels"):
        trunk(torch.randn(2, 7))
    assert hooks(model) == 0 and model.training


def test_split_model_for_ordinary_fine_tuning():
    model, x = vit(drop_rate=0.5), images()
    trunk, tail = split_model(model, 2)
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in tail.named_parameters())
    model.eval()
    assert_near(tail(trunk(x)), model(x), 1e-6)

    tail(trunk(x)).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == dict(tail.named_parameters()).keys()
    split_gradient = own["blocks.2.mlp.fc1.weight"].grad
    assert split_gradient is not None
    model.zero_grad()
    model(x).square().sum().backward()
    assert_near(split_gradient, own["blocks.2.mlp.fc1.weight"].grad, 1e-6)


def test_trunk_leaves_modes_as_they_are():
    model, x = vit(drop_rate=0.5), images()
    trunk, tail = split_model(model.eval(), 2)
    tail.train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    tokens = trunk(x)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not torch.equal(tail(tokens), tail(tokens))  # its dropout is on


# --- cache -----------------------------------------------------------------------------------


class Numbered(nn.Module):
    """Features that identify their input."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, :2], -x[:, :2]], 1).to(self.dtype)  # (batch, 2, 2)


def numbered(count: int = 10, batch: int = 4, offset: float = 0.0, **options) -> DataLoader:
    x = torch.arange(float(count))[:, None].expand(count, 3) + offset
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch, **options)


def cached(loader, path=None, trunk=None) -> CachedFeatures:
    return cache_features(trunk or Numbered(), loader, path, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_memory_and_file_hold_the_same(tmp_path, dtype):
    expected = Numbered(dtype)(torch.arange(10.0)[:, None].expand(10, 3))
    for path in (None, tmp_path / "new" / "folder"):
        data = cached(numbered(), path, Numbered(dtype))
        assert len(data) == 10
        assert data.features.dtype == dtype
        assert torch.equal(data.features, expected)
        assert torch.equal(data.targets, torch.arange(10) % 3)
        tokens, target = data[7]
        assert torch.equal(tokens, expected[7]) and target == 1
        batches = list(DataLoader(data, 4))  # pyright: ignore[reportArgumentType]
        assert torch.equal(torch.cat([x for x, _ in batches]), expected)


def test_tokens_of_a_transformer_train_its_tail(tmp_path):
    model, x = vit(), images(6)
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, tail = tangent.split()
    loader = DataLoader(TensorDataset(x, torch.arange(6) % 5), 4)
    memory, file = (cached(loader, path, trunk) for path in (None, tmp_path))
    assert memory.features.shape == (6, 17, 48)
    assert torch.equal(memory.features, file.features)
    assert not memory.features.requires_grad
    assert_near(tail(file.features), sum(exact_jvp(model, tangent.deltas(), x)))


def test_order_is_the_loaders():
    loader = numbered(shuffle=True, generator=generator(7))
    data = cached(loader)
    assert torch.equal(data.features[:, 0, 0].long() % 3, data.targets)
    assert sorted(data.features[:, 0, 0].tolist()) == list(range(10))


def test_subset_shares_memory():
    data = cached(numbered())
    subset = data.subset(np.array([8, 1, 1]))
    part: list[tuple[Tensor, Tensor]] = [subset[i] for i in range(len(subset))]
    assert [x[0, 0].item() for x, _ in part] == [8, 1, 1]
    assert [int(t) for _, t in part] == [2, 1, 1]
    assert part[0][0].untyped_storage().data_ptr() == data.features.untyped_storage().data_ptr()


def test_targets_may_be_lists_and_vectors():
    x = torch.zeros(4, 3)
    assert torch.equal(cached([(x, [1, 2, 3, 4])]).targets, torch.tensor([1, 2, 3, 4]))
    assert cached([[x, torch.zeros(4, 7)]]).targets.shape == (4, 7)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "yields no batch"),
        ([X], r"must yield \(inputs, targets\) batches"),
        ([(X, torch.zeros(4), X)], r"must yield \(inputs, targets\) batches"),
        ([{"image": X}], r"must yield \(inputs, targets\) batches.*must have its targets as 'lab"),
        ([{"image": X, "label": X}], r"does not take the field 'image' of the dict \['image'\]"),
        ([(X, torch.zeros(3))], "two tensors of equal length"),
        (TensorDataset(X, torch.zeros(4)), "needs a DataLoader around it"),
    ],
    ids=["empty", "no pair", "triple", "no labels", "unknown field", "lengths", "dataset"],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_bad_loaders(tmp_path, loader, message, in_file):
    with pytest.raises(ArgumentError, match=message):
        cached(loader, tmp_path if in_file else None)
    assert list(tmp_path.iterdir()) == []


def test_features_that_change_shape_or_number(tmp_path):
    widening = Computes(lambda _, x: x[:, : int(x[0, 0]) + 1])
    halving = Computes(lambda _, x: x[::2])
    batches = [(torch.full((4, 3), value), torch.zeros(4)) for value in (0.0, 1.0)]
    for path in (None, tmp_path):
        with pytest.raises(ArgumentError, match=r"gives \(4, 2\).*after rows of \(1,\)"):
            cached(batches, path, widening)
        with pytest.raises(ArgumentError, match=r"gives \(2, 3\).*for 4 targets"):
            cached(batches, path, halving)
    assert list(tmp_path.iterdir()) == []


def breaking():
    yield torch.ones(4, 3), torch.zeros(4)
    raise OSError("the disk with the images is gone")


def test_a_failure_leaves_the_older_file_as_it_was(tmp_path):
    with pytest.raises(OSError, match="is gone"):
        cached(breaking(), tmp_path)
    assert list(tmp_path.iterdir()) == []

    old = cached(numbered(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    with pytest.raises(OSError, match="is gone"):
        cached(breaking(), tmp_path)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == content
    assert torch.equal(old.features, cached(numbered()).features)


def test_a_second_cache_in_the_same_folder_leaves_the_first_one_valid(tmp_path):
    first = cached(numbered(), tmp_path)
    second = cached(numbered(3, offset=100.0), tmp_path)
    assert torch.equal(first.features, cached(numbered()).features)
    assert torch.equal(second.features, cached(numbered(3, offset=100.0)).features)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    second.features.zero_()  # a tensor as any other, but never written back
    assert file.read_bytes() == content


def test_two_caches_at_once_in_one_folder(tmp_path):
    other = []

    def interleaved():
        for index, batch in enumerate(numbered()):
            if index == 1:
                other.append(cached(numbered(offset=50.0), tmp_path))
            yield batch

    data = cached(interleaved(), tmp_path)
    assert torch.equal(data.features, cached(numbered()).features)
    assert torch.equal(other[0].features, cached(numbered(offset=50.0)).features)


def test_loader_workers_read_a_mapped_cache(tmp_path):
    data = cached(numbered(), tmp_path)
    context = multiprocessing.get_context("fork")
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context=context)  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.cat([x for x, _ in loader]), data.features)


def test_lengths_that_differ():
    with pytest.raises(ArgumentError, match="3 features but 2 targets"):
        CachedFeatures(torch.zeros(3, 1), torch.zeros(2))


def test_progress_can_be_silenced(capsys):
    cached(numbered())
    assert capsys.readouterr().err == ""
    cache_features(Numbered(), numbered())
    assert "features" in capsys.readouterr().err
