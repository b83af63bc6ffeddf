"""`fit` with autocast, cached features, repeated blocks, and on a GPU: mostly of tangent models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from training_cases import assert_equal, images, linear, quiet, tiny_vit, vectors

from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.linearize import last_blocks, linearize


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (None, torch.float32)])
@pytest.mark.parametrize("cache", [False, True])
def test_autocast_of_a_tangent_model(amp, dtype, cache):
    model, data = tiny_vit(), images()
    tangent = linearize(model, last_blocks(model, 1))
    seen = set()
    # Both parts of the model: below the first trained block, and the block itself, of which a cache
    # compares two forms without gradients first.
    below, trained = (tangent.anchor.get_submodule(f"blocks.{n}.mlp.fc1") for n in (0, 2))
    below.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    trained.register_forward_hook(
        lambda *args: seen.add(args[2].dtype) if torch.is_grad_enabled() else None
    )
    history = quiet(tangent, data, amp=amp, epochs=2, lr=1e-3, cache=cache)
    assert seen == {dtype}
    assert {delta.dtype for delta in tangent.deltas().values()} == {torch.float32}

    exact = linearize(model, last_blocks(model, 1))
    expected = quiet(exact, data, amp=False, epochs=2, lr=1e-3)
    assert history.loss == pytest.approx(expected.loss, rel=2e-2)


def test_amp_none_keeps_the_callers_autocast():
    model, data = tiny_vit(), images()

    def trained(amp):
        tangent = linearize(model, last_blocks(model, 1))
        quiet(tangent, data, amp=amp, epochs=2, lr=1e-3)
        return {name: delta.detach() for name, delta in tangent.deltas().items()}

    inside = trained(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(trained(None), inside)
        single = trained(False)
    assert_equal(single, trained(None))
    assert not torch.equal(single["head.weight"], inside["head.weight"])


@pytest.mark.parametrize("model", [linear(), linear().half()])
def test_float16_is_refused(model):
    data = vectors(dtype=torch.float16)
    autocast = torch.autocast("cpu", torch.float16, enabled=model.weight.dtype != torch.float16)
    refused = pytest.raises(UnsupportedError, match=r"fit in float16.*torch\.amp\.GradScaler")
    with autocast, refused:
        quiet(model, data, epochs=1)


def test_losses_get_16_bit_logits_in_float32():
    seen = []

    def loss(logits, targets):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    model = nn.Linear(4, 3)
    quiet(model, vectors(dtype=torch.float32), loss=loss, epochs=1, amp=True)
    assert seen == [torch.float32]


def trained_deltas(cache, dtype=torch.float64, loader=None, repeat=False, **options) -> Delta:
    model = tiny_vit().to(dtype)
    tangent = linearize(model, last_blocks(model, 2))
    tangent.set_grad_checkpointing(repeat)
    data = images(dtype=dtype)
    data = data if loader is None else loader(data)
    quiet(tangent, data, epochs=2, batch_size=8, lr=1e-3, cache=cache, **options)
    return tangent.delta_dict()


@pytest.mark.parametrize(
    "loader",
    [
        None,
        lambda data: DataLoader(data, batch_size=6, shuffle=True, drop_last=True),
        lambda data: DataLoader(data, batch_size=6, generator=torch.Generator()),
    ],
    ids=["dataset", "shuffled", "in order"],
)
def test_cached_features_change_nothing_but_rounding(loader):
    plain = trained_deltas(False, loader=loader)
    cached = trained_deltas(True, loader=loader)
    for name, value in plain.items():
        assert value.abs().max() > 1e-4, name
        assert torch.allclose(cached[name], value, rtol=0, atol=1e-9), name


def test_features_can_be_cached_in_a_folder(tmp_path):
    options = {"dtype": torch.float32, "optimizer": "sgd"}
    plain, cached = trained_deltas(False, **options), trained_deltas(tmp_path, **options)
    assert any(tmp_path.iterdir())
    for name, value in plain.items():
        assert torch.allclose(cached[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))


def test_cached_features_are_computed_once():
    def forwards(epochs):
        model, count = tiny_vit(), []
        tangent = linearize(model, last_blocks(model, 1))
        entry = tangent.anchor.get_submodule("patch_embed")
        entry.register_forward_hook(lambda *args: count.append(1))
        quiet(tangent, images(), epochs=epochs, cache=True)
        return len(count)

    assert forwards(epochs=5) == forwards(epochs=1) > 0


def test_cache_is_for_tangent_models_and_batches():
    with pytest.raises(ArgumentError, match="needs a LinearizedModel, got a VisionTransformer"):
        quiet(tiny_vit(), images(), cache=True)
    tangent = linearize(tiny_vit(), "head")
    unbatched = DataLoader(images(), batch_size=None)
    with pytest.raises(ArgumentError, match="makes batches"):
        quiet(tangent, unbatched, cache=True)
    with pytest.raises(UnsupportedError):
        quiet(linearize(tiny_vit()), images(), cache=True)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_repeated_blocks_train_the_same(accumulate):
    """By SGD: AdamW would scale up the gradient of a key's bias, which is rounding alone."""
    options = {"accumulate": accumulate, "optimizer": "sgd"}
    kept, repeated = (trained_deltas(False, repeat=r, **options) for r in (False, True))
    for name, value in kept.items():
        largest = float(value.abs().max())
        assert largest > 1e-4, name
        assert torch.allclose(repeated[name], value, rtol=0, atol=1e-13 * largest), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cache", [False, True])
def test_moves_model_and_batches(cache):
    model = tiny_vit()
    tangent = linearize(model, last_blocks(model, 1))
    generator = torch.cuda.get_rng_state()
    history = quiet(tangent, images(), device="cuda", lr=1e-3, epochs=2, cache=cache)
    assert all(delta.is_cuda for delta in tangent.deltas().values())
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    expected = linearize(model, last_blocks(model, 1))
    assert history.loss == pytest.approx(
        quiet(expected, images(), lr=1e-3, epochs=2).loss, rel=5e-2
    )
