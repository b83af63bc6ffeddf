import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.evaluate import accuracy, predict
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.linearize import last_blocks, linearize
from tangent_ops.training.fit import SCHEDULES, History, fit, fit_head


def quiet(*args, **options) -> History:
    return fit(*args, progress=False, **options)


def tiny_vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=5, **options)
    with torch.no_grad():  # timm's start is so small that every image looks the same
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def images(count=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(count) % 5
    inputs = torch.randn(count, 3, 16, 16, generator=generator, dtype=dtype)
    return TensorDataset(inputs + 0.1 * targets[:, None, None, None], targets)


def vectors(count=12, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 4, generator=generator, dtype=dtype)
    return TensorDataset(inputs, torch.arange(count) % classes)


def linear(**options):
    torch.manual_seed(3)
    return nn.Linear(4, 3, **options).double()


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


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


@pytest.mark.parametrize("accumulate", [1, 3])
def test_repeated_blocks_train_the_same(accumulate):
    """Not AdamW: it makes a step of the rounding that is all the gradient of a key's bias."""
    options = {"accumulate": accumulate, "optimizer": "sgd"}
    kept, repeated = (trained_deltas(False, repeat=r, **options) for r in (False, True))
    for name, value in kept.items():
        largest = float(value.abs().max())
        assert largest > 1e-4, name
        assert torch.allclose(repeated[name], value, rtol=0, atol=1e-13 * largest), name


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


def generator_states():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


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


# Modes and precision


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


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (None, torch.float32)])
@pytest.mark.parametrize("cache", [False, True])
def test_autocast_of_a_tangent_model(amp, dtype, cache):
    model, data = tiny_vit(), images()
    tangent = linearize(model, last_blocks(model, 1))
    seen = set()
    # Both parts of the model: below the first trained block, and the block itself.
    for block in (0, 2):
        layer = tangent.anchor.get_submodule(f"blocks.{block}.mlp.fc1")
        layer.register_forward_hook(lambda *args: seen.add(args[2].dtype))
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


# Caching


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


# What stops it


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_stops_before_the_step(optimizer):
    inputs, targets = (tensor.clone() for tensor in vectors(count=6).tensors)
    clean = TensorDataset(inputs[:4].clone(), targets[:4])
    inputs[4] = float("nan")
    options = {"optimizer": optimizer, "schedule": "constant", "lr": 0.01, "epochs": 1}
    expected, model = linear(), linear()
    quiet(expected, DataLoader(clean, batch_size=2), **options)
    message = r"epoch 1 of 1, step 3 of 3, at lr=0\.01; .*inputs for NaN.* lower lr"
    with pytest.raises(NonFiniteLossError, match=message):
        quiet(model, DataLoader(TensorDataset(inputs, targets), batch_size=2), **options)
    assert_equal(parameters_of(model), parameters_of(expected))
    assert model.weight.grad is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: (0 * logits).sum().sqrt(),  # 0, its gradient NaN
        lambda logits, targets: logits.sum() + math.inf,  # its gradient finite
    ],
)
def test_either_of_loss_and_gradient_stops_it(loss):
    model = linear()
    before = parameters_of(model)
    with pytest.raises(NonFiniteLossError, match="loss or its gradient"):
        quiet(model, vectors(), loss=loss)
    assert_equal(parameters_of(model), before)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(4), 0


class Promising(IterableDataset):
    def __len__(self):
        return 5

    def __iter__(self):
        return iter(())


class Images(Dataset):
    """Yields what a careless dataset may yield."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item


def uneven(items):
    return torch.zeros(len(items), 4).double(), torch.zeros(len(items) + 1, dtype=torch.int64)


def none_of_them(items):
    return torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(vectors(), 4, collate_fn=none_of_them), "a batch without samples"),
        (TensorDataset(torch.zeros(0, 4), torch.zeros(0)), "data is empty$"),
        (DataLoader(vectors(count=3), batch_size=4, drop_last=True), "empty: .*drop_last"),
        (DataLoader(Promising()), "yielded no batch"),
        (Endless(), "must have a length, this Endless has none"),
        (DataLoader(Endless()), "must have a length, this DataLoader has none"),
        (vectors().tensors, "data must be a DataLoader or a Dataset .* got a tuple"),
        (Images(torch.zeros(4)), r"\(input, target\) batches, got a Tensor"),
        (Images((torch.zeros(4), 1, 2)), r"got a (list|tuple) of 3: \(Tensor, Tensor, Tensor\)"),
        (Images((torch.zeros(4), "cat")), r"must be tensors, got .*\(Tensor, (list|tuple)\)"),
        (DataLoader(vectors(), 4, collate_fn=uneven), r"got shapes \(4, 4\) and \(5,\)"),
    ],
)
def test_refuses_data(data, message):
    with pytest.raises(ArgumentError, match=message):
        quiet(linear(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"seed": -1}, "seed must be"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"l2": -1e-3}, "l2 must be finite and not negative"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"optimizer": "adam"}, r"optimizer must be one of \['adamw', 'sgd'\], got 'adam'"),
        ({"schedule": "linear"}, "schedule must be one of .*'step'.*, got 'linear'"),
        ({"loss": nn.MSELoss(reduction="none")}, r"a scalar tensor, got shape \(8, 3\)"),
        ({"loss": lambda logits, targets: None}, "a scalar tensor, got None"),
        ({"loss": lambda logits, targets: torch.zeros(())}, "does not depend on any trainable"),
    ],
)
def test_refuses_options(options, message):
    model = linear()
    before = parameters_of(model)
    data = TensorDataset(torch.zeros(8, 4).double(), torch.zeros(8, 3).double())
    with pytest.raises(ArgumentError, match=message):
        quiet(model, data, **options)
    assert_equal(parameters_of(model), before)


def test_refuses_a_model_without_trainable_parameters():
    with pytest.raises(ArgumentError, match="no trainable parameters"):
        quiet(linear().requires_grad_(False), vectors())


# Progress and devices


def test_progress_shows_the_loss_and_can_be_silenced(capsys):
    fit(linear(), vectors(), epochs=2)
    shown = capsys.readouterr().err
    assert "fit" in shown and "loss=" in shown and "2/2" in shown
    quiet(linear(), vectors(), epochs=2)
    fit_head(tiny_vit(), images(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


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


# Linear probe


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


def test_a_probe_needs_a_timm_model_with_one_linear_classifier():
    with pytest.raises(UnsupportedError, match=r"Linear lacks \['forward_features'"):
        fit_head(nn.Linear(4, 3), vectors())
    model = tiny_vit()
    model.set_submodule("head", nn.Sequential(nn.Linear(24, 5)))
    with pytest.raises(UnsupportedError, match=r"one nn\.Linear .* this is a Sequential"):
        fit_head(model, images())


def test_the_recipe_probe_first_then_the_last_block():
    data = images()
    probe, _ = fit_head(tiny_vit(), data, epochs=10, progress=False)
    tangent = linearize(probe, last_blocks(probe, 1))
    history = quiet(tangent, data, epochs=20, lr=1e-2, cache=True)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert accuracy(tangent, data) > accuracy(probe, data)
