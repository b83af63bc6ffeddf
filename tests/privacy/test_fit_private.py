"""`fit_private` against DP-SGD written out, its noise, sampling, resuming, processes, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import images, moved, vit
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")

from tangent_ops import Delta, last_blocks, linearize, load_delta, save_delta
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.privacy import state as _state
from tangent_ops.privacy.accounting import Phase, epsilon
from tangent_ops.privacy.checks import check_contents
from tangent_ops.privacy.fit import PrivateFit, fit_private
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.per_sample.gradients import per_sample_gradients
from tangent_ops.privacy.sampling import PoissonBatches
from tangent_ops.privacy.statement import make_statement, statement_of

COUNT = 30


def a_tangent(dtype=torch.float32):
    model = vit(depth=1, embed_dim=12, num_heads=2).to(dtype)
    return linearize(model, last_blocks(model, 1))


def data(count=COUNT, dtype=torch.float32) -> TensorDataset:
    return TensorDataset(images(count).to(dtype), torch.arange(count) % 5)


def run(tangent=None, dataset=None, **options) -> PrivateFit:
    options = {
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "expected_batch_size": 8,
        "steps": 5,
        "seed": 0,
        "progress": False,
        **options,
    }
    dataset = data() if dataset is None else dataset
    return fit_private(tangent or a_tangent(), dataset, **options)


def flat(delta) -> Tensor:
    return torch.cat([value.double().flatten() for value in delta.values()])


def written_out(
    steps=5, lr=0.1, clip=1.0, l2=0.0, batch=8, cosine=False, dtype=torch.float64
) -> Tensor:
    """DP-SGD without noise: gradients one by one, in float64."""
    tangent, dataset, loss = a_tangent(dtype), data(dtype=dtype), RescaledSquareLoss()
    deltas = list(tangent.deltas().values())
    for step, drawn in enumerate(PoissonBatches(COUNT, batch / COUNT, steps, (0, 1))):
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2 if cosine else lr
        total = [torch.zeros_like(delta) for delta in deltas]
        for index in drawn:
            x, y = dataset[index]
            gradients = torch.autograd.grad(loss(tangent(x[None]), y[None]), deltas)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            for t, g in zip(total, gradients, strict=True):
                t += g * min(1.0, clip / norm)
        with torch.no_grad():
            for delta, t in zip(deltas, total, strict=True):
                delta -= rate * (t / batch + l2 * delta)
    return flat(tangent.delta_dict())


@pytest.mark.parametrize("clip, l2, cosine", [(1.0, 0.0, False), (1e4, 0.3, True)])
def test_is_dp_sgd(clip, l2, cosine):
    """With noise too small to see; a clip that binds, and one that does not."""
    found = run(
        a_tangent(torch.float64),
        data(dtype=torch.float64),
        optimizer="sgd",
        lr=0.1,
        l2=l2,
        max_grad_norm=clip,
        noise_multiplier=1e-12 / clip,
        schedule="cosine" if cosine else "constant",
    )
    right = written_out(clip=clip, l2=l2, cosine=cosine)
    assert float((flat(found.delta) - right).norm()) <= 1e-9 * float(right.norm())


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_deviation_that_is_claimed(secure):
    """One step of SGD: the delta is -lr (sum + σ C z) / E; the sum is at most n C long."""
    sigma, clip, batch = 1000.0, 0.01, 8
    dataset = data()
    options = {"optimizer": "sgd", "lr": 1.0, "steps": 1, "noise_multiplier": sigma}
    seed = None if secure else 3
    found = run(
        None,
        dataset,
        **options,
        max_grad_norm=clip,
        expected_batch_size=batch,
        seed=seed,
        secure_mode=secure,
    )
    z = -flat(found.delta) * batch / (sigma * clip)
    # The sum is COUNT / sigma long at most, over thousands of entries of z.
    assert len(z) > 1900
    spread = 5 / math.sqrt(2 * len(z))
    assert abs(float(z.std()) - 1) < spread
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z))
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / math.sqrt(len(z))  # each entry its own


def test_modes_virtual_batches_and_cache_change_rounding_alone():
    right = flat(run().delta)
    others = [
        run(mode="ghost"),
        run(mode="per-sample"),
        run(physical_batch_size=3),
        run(cache=True),
        run(workers=1, physical_batch_size=2),
    ]
    for other in others:
        assert float((flat(other.delta) - right).norm()) <= 1e-5 * float(right.norm())


@pytest.mark.gpu
def test_on_a_gpu():
    """The same batches; other noise, which is small here."""
    quiet = {"noise_multiplier": 1e-3, "max_grad_norm": 1e-2, "optimizer": "sgd", "lr": 0.1}
    right = flat(run(**quiet).delta)
    found = run(**quiet, device="cuda")
    assert {value.device.type for value in found.delta.values()} == {"cuda"}
    assert float((flat(found.delta).cpu() - right).norm()) <= 0.02 * float(right.norm())


def test_an_empty_batch_is_a_step_of_noise():
    tangent = a_tangent()
    found = run(tangent, expected_batch_size=1, steps=8)  # e^-1 of the batches are empty
    drawn = list(PoissonBatches(COUNT, 1 / COUNT, 8, (0, 1)))
    assert any(not batch for batch in drawn) and any(drawn)
    assert found.statement.phases == (Phase(1.0, 1 / COUNT, 8),)
    assert len(found.delta) == len(tangent.deltas())


def test_a_seed_decides_everything_and_none_decides_nothing():
    assert torch.equal(flat(run().delta), flat(run().delta))
    assert not torch.equal(flat(run().delta), flat(run(seed=1).delta))
    assert not torch.equal(flat(run(seed=None).delta), flat(run(seed=None).delta))


def test_the_callers_generators_are_left_alone():
    tangent = a_tangent()
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(tangent)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("at", [1, 3])
def test_goes_on_bit_for_bit(optimizer, at, tmp_path, monkeypatch):
    options = {"optimizer": optimizer, "schedule": "cosine", "physical_batch_size": 5}
    right = run(**options)
    options |= {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}
    tangent = a_tangent()
    with monkeypatch.context() as patch:
        patch.setattr(_state.State, "advance", stopping(at))
        with pytest.raises(Stopped):
            run(tangent, **options)
    found = run(tangent, **options)  # whose deltas have moved meanwhile
    assert torch.equal(flat(found.delta), flat(right.delta))
    assert found.statement == right.statement  # the steps before it was stopped are paid for
    assert not (tmp_path / "fit").exists()


def stopping(at: int):
    advance = _state.State.advance

    def advance_and_stop(self) -> None:
        advance(self)
        if self.step == at:
            raise Stopped

    return advance_and_stop


def test_without_a_seed_a_checkpoint_goes_on_with_the_same_noise(tmp_path, monkeypatch):
    """A step may be made twice, but never with two draws of noise on the same sum."""
    options = {"checkpoint": tmp_path / "fit", "checkpoint_every": 2, "seed": None}
    seen = []
    take = _state.State.advance

    def watched(self) -> None:
        take(self)
        seen.append((self.step, flat(self._parameters)))
        if len(seen) == 3:
            raise Stopped

    monkeypatch.setattr(_state.State, "advance", watched)
    with pytest.raises(Stopped):
        run(**options)
    run(**options)  # goes on after step 2
    (third, before), (again, after) = seen[2], seen[3]
    assert third == again == 3
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "other",
    [{"noise_multiplier": 2.0}, {"steps": 6}, {"max_grad_norm": 2.0}, {"seed": 1}, {"lr": 0.5}],
)
def test_a_checkpoint_of_another_fit_is_refused(other, tmp_path, monkeypatch):
    options = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(_state.State, "advance", stopping(1))
        with pytest.raises(Stopped):
            run(**options)
    with pytest.raises(ArgumentError, match="another problem"):
        run(**options, **other)


def test_the_statement_goes_with_the_delta(tmp_path):
    found = run(noise_multiplier=None, target_epsilon=2.0, delta=1e-3)
    said = found.statement
    assert 1.9 < said.epsilon <= 2.0
    assert epsilon(said.phases, 1e-3) <= 2.0
    save_delta(found.delta, tmp_path / "delta.safetensors")
    loaded = load_delta(tmp_path / "delta.safetensors")
    assert isinstance(loaded, Delta)
    assert statement_of(loaded) == said
    assert any("seed" in line for line in said.assumes)
    assert not hasattr(found, "loss")  # of the private data, and not paid for


def test_going_on_adds_up():
    tangent = a_tangent()
    first = run(tangent)
    with pytest.raises(ArgumentError, match=r"not zero.*start=.*'public'"):
        run(tangent)
    second = run(tangent, start=first.statement)
    assert second.statement.phases == (*first.statement.phases, Phase(1.0, 8 / COUNT, 5))
    assert second.statement.epsilon > 1.2 * first.statement.epsilon
    spent = replace(first.statement, assumes=("the moon is full",), clip=9.0)
    said = run(moved(a_tangent()), start=spent).statement
    assert "the moon is full" in said.assumes and said.clip == 9.0  # that has to hold still
    target = run(
        moved(a_tangent()), start=first.statement, noise_multiplier=None, target_epsilon=9.0
    )
    assert 8.5 < target.statement.epsilon <= 9.0
    public = run(moved(a_tangent()), start="public")
    assert public.statement.epsilon == pytest.approx(first.statement.epsilon)
    assert any("depend on no private" in line for line in public.statement.assumes)


def test_poisson_sampling():
    """Every sample with probability q, independent of others and of other steps."""
    rate, steps, count = 0.2, 4000, 10
    for key in ((3, 1), None):
        drawn = torch.zeros(steps, count)
        for row, batch in zip(drawn, PoissonBatches(count, rate, steps, key), strict=True):
            row[batch] = 1
        error = 5 * math.sqrt(rate * (1 - rate) / steps)
        assert float((drawn.mean(0) - rate).abs().max()) < error
        pairs = (drawn.T @ drawn / steps - rate**2).fill_diagonal_(0)
        assert float(pairs.abs().max()) < 5 * rate / math.sqrt(steps)
        lagged = drawn[1:].T @ drawn[:-1] / (steps - 1) - rate**2
        assert float(lagged.abs().max()) < 5 * rate / math.sqrt(steps)
    parts = [PoissonBatches(count, rate, 50, (3, 1), rank=r, world=3) for r in range(3)]
    whole = list(PoissonBatches(count, rate, 50, (3, 1)))
    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == whole
    assert list(PoissonBatches(count, rate, 50, (3, 1), start=20)) == whole[20:]


WORKER = """
import sys, torch
from torch import distributed
sys.path[:0] = {paths!r}
from test_fit_private import run, flat
torch.set_num_threads(1)
rank = int(sys.argv[1])
distributed.init_process_group(
    "gloo", init_method="file://{folder}/meet", rank=rank, world_size=2
)
found = run(noise_multiplier=2.0, expected_batch_size=3, steps=6, physical_batch_size=2, {options})
torch.save((flat(found.delta), found.statement.to_json()), f"{folder}/{{rank}}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_a_group_train_what_one_would(tmp_path):
    """Batches that are empty on one process, or on both, are among them; noise comes once."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = WORKER.format(paths=paths, folder=tmp_path, options="seed=0")
    workers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(rank)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    (one, said), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    right = run(noise_multiplier=2.0, expected_batch_size=3, steps=6)
    assert torch.equal(one, other)
    assert float((one - flat(right.delta)).norm()) <= 1e-5 * float(one.norm())
    assert said == right.statement.to_json()


def test_a_group_goes_on_from_one_checkpoint_or_not_at_all(monkeypatch):
    """A file that one process alone can see: they would draw other batches, in silence."""
    state = _state.State({}, torch.optim.SGD([nn.Parameter(torch.ones(1))]), NoiseSource(0), (0, 1))

    others = []

    def gather(found: list, own: object) -> None:
        found[:] = [own, others[-1]]

    monkeypatch.setattr(_state.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(_state.distributed, "all_gather_object", gather)
    others.append((0, (0, 1)))
    state.check_group()
    for other in ((4, (0, 1)), (0, (7, 1))):
        others.append(other)
        with pytest.raises(ArgumentError, match="not the same file in all processes"):
            state.check_group()


class Fitted:
    def __init__(self) -> None:
        self.mean_ = 0.5

    def __call__(self, x):
        return x - self.mean_


class Photos(TensorDataset):
    transform: object = None


class Stream(IterableDataset):
    def __iter__(self):
        yield from [data()[0]]


def photos(transform) -> Photos:
    dataset = Photos(images(COUNT), torch.arange(COUNT) % 5)
    dataset.transform = transform
    return dataset


def composed(*steps):
    return SimpleNamespace(transforms=[*steps])


def standardised(dims) -> TensorDataset:
    x = images(COUNT) * 3 + 1
    x = (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True)
    return TensorDataset(x, torch.arange(COUNT) % 5)


@pytest.mark.parametrize(
    "dataset",
    [
        photos(Fitted()),
        Subset(photos(composed(str, Fitted())), range(20)),
        ConcatDataset(
            [
                Subset(photos(None), range(10)),
                Subset(photos(composed(composed(Fitted()))), range(10, COUNT)),
            ]
        ),
        standardised((0,)),
        standardised((0, 2, 3)),
    ],
)
def test_refuses_preprocessing_that_was_fitted(dataset):
    tangent = a_tangent()
    with pytest.raises(UnsupportedError, match="public_preprocessing=True"):
        run(tangent, dataset)
    assert not any(delta.any() for delta in tangent.deltas().values())
    said = run(tangent, dataset, public_preprocessing=True, steps=1).statement
    assert any("preprocessing learned" in line for line in said.assumes)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (DataLoader(data()), r"pass loader\.dataset"),
        (Stream(), "map-style"),
        ([1, 2], "map-style"),
        (Subset(data(), []), "empty"),
        (Subset(data(), [0, 1, 2, 1]), "one sample 2 times"),
        (ConcatDataset([whole := data(), Subset(whole, [4])]), "one sample 2 times"),
    ],
)
def test_refuses_data(dataset, message):
    with pytest.raises(ArgumentError, match=message):
        run(None, dataset)


def copied(target: int, *, much: float = 0.0) -> TensorDataset:
    """Sample 4 once more, as sample 30."""
    inputs, classes = data().tensors
    again = inputs[4:5] + much
    return TensorDataset(torch.cat([inputs, again]), torch.cat([classes, torch.tensor([target])]))


class Decoded(Dataset):
    """Reads a sample anew each time, and has an index for each."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.inner = dataset

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        torch.rand(1)  # as an augmentation does
        x, y = self.inner[index]
        return x.numpy().copy(), int(y)


@pytest.mark.parametrize(
    "dataset",
    [
        copied(4),
        copied(1),  # another target makes it no other person's
        Decoded(copied(4)),
        ConcatDataset([data(), Subset(copied(4), [30])]),
        ConcatDataset([data(), data()]),
    ],
)
def test_refuses_a_copy_of_a_sample(dataset):
    with pytest.raises(ArgumentError, match=r"one sample 2 times: the inputs [04] and 30 are the"):
        run(None, dataset)


def test_reading_the_contents_takes_what_differs_and_draws_no_random_numbers():
    other = copied(4, much=2.0**-20)
    assert not torch.equal(other[4][0], other[30][0])
    state = torch.get_rng_state()
    check_contents(DataLoader(Decoded(other), 7, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delta": 1 / COUNT}, r"not below 1/N = 0\.0333"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be positive"),
        ({"noise_multiplier": None}, "one of target_epsilon and noise_multiplier"),
        ({"target_epsilon": 1.0}, "one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ({"noise_multiplier": None, "target_epsilon": -1.0}, "target_epsilon must be positive"),
        ({"expected_batch_size": COUNT + 1}, "from 1 to the number of samples, 30"),
        ({"steps": 0}, "steps"),
        ({"mode": "fast"}, r"mode must be one of \['bookkeeping'"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"schedule": "up"}, "schedule must be one of"),
        ({"start": "somewhere"}, "start must be one of"),
        ({"l2": -1.0}, "l2 must not be negative"),
        ({"seed": 0, "secure_mode": True}, "seed and secure"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "mean of the samples"),
        ({"checkpoint": "/nowhere/fit"}, "does not exist"),
    ],
)
def test_refuses_options(options, message):
    tangent = a_tangent()
    with pytest.raises(ArgumentError, match=message):
        run(tangent, **options)
    assert not any(delta.any() for delta in tangent.deltas().values())


def test_refuses_losses_that_mix_samples_though_the_first_do_not_show_it():
    """Class weights and ignored targets tie a sample's gradient to the others of its batch."""
    inputs, classes = images(COUNT), torch.arange(5).repeat_interleave(6)
    data = TensorDataset(inputs, classes)
    weights = torch.tensor([1.0, 2, 3, 4, 5])
    for loss in (nn.CrossEntropyLoss(weights), nn.CrossEntropyLoss(ignore_index=4)):
        with pytest.raises(ArgumentError, match="mean of the samples"):
            run(dataset=data, loss=loss)
    unknown = TensorDataset(inputs, classes.clone().index_fill(0, torch.tensor([29]), -100))
    with pytest.raises(ArgumentError, match="mean of the samples"):
        run(dataset=unknown, loss=nn.CrossEntropyLoss(), expected_batch_size=COUNT, steps=1)
    with pytest.raises(ArgumentError, match="mean of the samples"):
        per_sample_gradients(a_tangent(), inputs[:6], classes[:6], nn.CrossEntropyLoss(weights))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(12, track_running_stats=False), "training"])
def test_refuses_a_batch_norm_that_uses_its_batch(norm):
    layer = nn.BatchNorm1d(12) if norm == "training" else norm
    tangent = linearize(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 5)))
    if norm == "training":
        run(tangent, TensorDataset(torch.randn(COUNT, 6) + 1, torch.arange(COUNT) % 5))
        tangent = linearize(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 5)))
        tangent.anchor.train()
    with pytest.raises(UnsupportedError, match=r"^1 is a batch norm"):
        run(tangent, TensorDataset(torch.randn(COUNT, 6) + 1, torch.arange(COUNT) % 5))


def test_refuses_an_ordinary_model():
    with pytest.raises(ArgumentError, match="LinearizedModel"):
        run(nn.Linear(2, 2), data())


def test_a_sample_that_is_not_finite_stops_it():
    x, y = data().tensors
    x[3] = float("nan")
    tangent = a_tangent()
    with pytest.raises(NonFiniteLossError, match="gradient of a sample"):
        run(tangent, TensorDataset(x, y), expected_batch_size=COUNT, steps=1)
    assert not any(delta.any() for delta in tangent.deltas().values())


def test_a_statement_of_other_samples_does_not_vanish():
    """What was spent before counts at the delta of this fit."""
    spent = make_statement(
        mechanism="by hand",
        phases=(Phase(0.7, 1.0, 1),),
        clip=1.0,
        delta=1e-6,
        sampling="all",
        noise="drawn",
        assumes=(),
    )
    found = run(moved(a_tangent()), start=spent).statement
    assert found.delta == 1e-3
    assert found.epsilon > spent.epsilon_at(1e-3)
