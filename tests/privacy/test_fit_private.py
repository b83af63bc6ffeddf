"""`fit_private` against DP-SGD written out, its noise, sampling, resuming and processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from private_runs import COUNT, a_tangent, data, flat, run
from small_models import moved
from statements import a_statement
from torch import Tensor, nn
from two_processes import results

from tangent_ops import Delta, load_delta, save_delta
from tangent_ops.errors import ArgumentError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.privacy import state as _state
from tangent_ops.privacy.accounting import Phase, epsilon
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.sampling import PoissonBatches
from tangent_ops.privacy.statement import statement_of


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
    """With negligible noise; with a clip that binds and one that does not."""
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
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / math.sqrt(len(z))  # entries are independent


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
    """The GPU draws the same batches but other noise, which is small here."""
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
    """A repeated step must not draw new noise for the same sum."""
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
    assert not hasattr(found, "loss")  # the loss depends on private data and is not accounted for


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
    assert "the moon is full" in said.assumes and said.clip == 9.0  # they still hold
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


def work(rank: int, folder: Path) -> tuple[Tensor, str]:
    found = run(noise_multiplier=2.0, expected_batch_size=3, steps=6, physical_batch_size=2)
    return flat(found.delta), found.statement.to_json()


def test_processes_of_a_group_train_what_one_would(tmp_path):
    """Some batches are empty on one process or on both; noise is added once."""
    (one, said), (other, _) = results("test_fit_private", tmp_path)
    right = run(noise_multiplier=2.0, expected_batch_size=3, steps=6)
    assert torch.equal(one, other)
    assert float((one - flat(right.delta)).norm()) <= 1e-5 * float(one.norm())
    assert said == right.statement.to_json()


def test_a_group_goes_on_from_one_checkpoint_or_not_at_all(monkeypatch):
    """With a file that only one process sees, the processes would draw different batches."""
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


def test_a_statement_of_other_samples_does_not_vanish():
    """Earlier phases are accounted for at the delta of this fit."""
    spent = a_statement(Phase(0.7, 1.0, 1), delta=1e-6)
    found = run(moved(a_tangent()), start=spent).statement
    assert found.delta == 1e-3
    assert found.epsilon > spent.epsilon_at(1e-3)
