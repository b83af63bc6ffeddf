"""What only a ledger of statistics does: samples forgotten, optima, refusals, and its files."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_contents import (
    META,
    SAMPLES,
    STATISTICS_META,
    add,
    assert_has,
    numbers_of,
    some_statistics,
    statistics_of,
)
from ledger_helpers import assert_tidy, edit_database, refused, shard_folder, sum_file, tree
from torch import nn
from torch.utils.data import Subset, TensorDataset

import tangent_ops
from tangent_ops import Ledger, StatisticsLedger, load_statistics, save_statistics
from tangent_ops.composition.ledger import VerifiedStatistics, open_ledger
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import (
    ArgumentError,
    LedgerError,
    StatisticsError,
    StatisticsFileError,
)


@pytest.fixture
def kind():
    return StatisticsLedger


# Sequences: forget a shard, with or without rebuild, or some samples of it.
STEPS = st.tuples(
    st.integers(0, 4),
    st.integers(0, 200),
    st.sampled_from(["forget", "rebuild", "samples", "samples"]),
    st.sets(st.integers(0, SAMPLES - 1), min_size=1),
)


@given(steps=st.lists(STEPS, min_size=1, max_size=10), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_was_forgotten_was_never_there(steps, order):
    present: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ledger = StatisticsLedger(Path(folder) / "ledger")
        for number, seed, how, some in steps:
            shard = f"shard {number}"
            if shard not in present:
                add(ledger, shard, seed, {"seed": seed})
                present[shard] = list(numbers_of(seed))
            elif how == "samples":
                gone = [n for i, n in enumerate(present[shard]) if i in some] or present[shard][:1]
                ledger.forget_samples(shard, statistics_of(gone))
                present[shard] = [n for n in present[shard] if n not in gone]
                if not present[shard]:
                    del present[shard]
            else:
                ledger.forget(shard, rebuild=how == "rebuild")
                del present[shard]
        assert {entry.shard: entry.samples for entry in ledger.list()} == {
            shard: len(numbers) for shard, numbers in present.items()
        }
        found = ledger.verify()
        assert (found.shards, found.samples) == (len(present), sum(map(len, present.values())))
        assert_tidy(ledger)
        if not present:
            with pytest.raises(LedgerError, match="nothing to compose"):
                ledger.statistics()
            return
        assert_has(ledger, [number for numbers in present.values() for number in numbers])
        never = StatisticsLedger(Path(folder) / "never")
        for shard in order.sample(sorted(present), len(present)):
            never.add(shard, statistics_of(present[shard]))
        assert ledger.statistics() == never.statistics()
        for shard in present:  # the shards' files, too: lists of samples and all
            one, other = (one._kind.load(*_place(one, shard))[0] for one in (ledger, never))
            assert one == other
            assert one.digests is not None and other.digests is not None
            assert torch.equal(one.digests, other.digests)


def _place(ledger, shard):
    with ledger._records.reading() as transaction:
        return shard_folder(ledger), transaction.shard(shard).seal, shard


def test_a_repeated_sample_is_forgotten_as_often_as_it_is_given(folder):
    ledger = StatisticsLedger(folder)
    ledger.add("a", statistics_of([1, 1, 2]))
    ledger.forget_samples("a", statistics_of([1]))
    assert_has(ledger, [1, 2])
    ledger.forget_samples("a", statistics_of([1]))
    work = partial(ledger.forget_samples, "a", statistics_of([1]))
    refused(folder, "shard 'a': 1 of the 1 samples to take", work, error=StatisticsError)


# A model's statistics


@pytest.fixture(scope="module")
def tangent():
    torch.manual_seed(0)
    return tangent_ops.linearize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))


def of(tangent, data, indices, **options):
    return tangent_ops.statistics(tangent, Subset(data, list(indices)), progress=False, **options)


def test_the_optimum_is_that_of_data_that_never_had_the_samples(folder, tangent, data, tmp_path):
    ledger = StatisticsLedger(folder, anchor=tangent)
    ledger.add("a", of(tangent, data, range(10)))
    save_statistics(of(tangent, data, range(10, 24)), tmp_path / "b")
    ledger.add("b", tmp_path / "b")
    ledger.forget_samples("a", of(tangent, data, [3]))
    save_statistics(of(tangent, data, [11, 20]), tmp_path / "gone")
    ledger.forget_samples("b", tmp_path / "gone")
    rest = [n for n in range(24) if n not in (3, 11, 20)]
    whole = of(tangent, data, rest)
    assert ledger.statistics() == whole
    found, expected = ledger.solve(1e-2), whole.solve(1e-2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (found.l2, found.condition, found.loss) == (
        expected.l2, expected.condition, expected.loss,
    )  # fmt: skip
    for one, other in zip(ledger.solve_path([1e-3, 1]), whole.solve_path([1e-3, 1]), strict=True):
        assert (one.gcv, one.effective_dimension) == (other.gcv, other.effective_dimension)
        assert all(torch.equal(one.delta[name], other.delta[name]) for name in one.delta)
    tangent.load_delta_dict(found)


def test_the_rest_equals_a_fit_of_the_rest(folder, data):
    """An oracle of its own: the least-squares problem of the rest in float64, J by autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tangent = tangent_ops.linearize(model)
    double = TensorDataset(data.tensors[0].double(), data.tensors[1])
    ledger = StatisticsLedger(folder)
    ledger.add("a", of(tangent, double, range(12), fraction_bits=40))
    ledger.add("b", of(tangent, double, range(12, 24), fraction_bits=40))
    ledger.forget_samples("a", of(tangent, double, range(5), fraction_bits=40))
    ledger.forget("b")
    delta = ledger.solve(1e-1)

    inputs, labels = double.tensors[0][5:12], double.tensors[1][5:12]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (inputs,)))(weights)
    columns = torch.cat([jacobian[name].reshape(21, -1) for name in delta], dim=1)
    scale = tangent_ops.losses.RescaledSquareLoss().M
    residual = (scale * nn.functional.one_hot(labels, 3).double() - model(inputs)).detach()
    hessian = columns.T @ columns * (2 / 21) + 1e-1 * torch.eye(columns.shape[1]).double()
    expected = torch.linalg.solve(hessian, columns.T @ residual.reshape(-1) * (2 / 21))
    found = torch.cat([value.reshape(-1) for value in delta.values()])
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert expected.abs().max() > 0.1


# Lists, verification, meta


def test_lists_shards_with_samples_time_and_meta(ledger):
    one, two = ledger.list()
    assert (one.shard, one.samples) == ("a", SAMPLES)
    assert one.meta == {"who": "Ada", "n": 3, "x": 0.5, "ok": True, "no": None}
    assert (two.shard, two.samples, two.meta) == ("b", SAMPLES, {})
    ledger.forget_samples("a", statistics_of(numbers_of(1)[:1]))
    left, _ = ledger.list()
    assert left == dataclasses.replace(one, samples=SAMPLES - 1)
    size = sum(file.stat().st_size for file in shard_folder(ledger).iterdir())
    assert ledger.verify() == VerifiedStatistics(2, 2 * SAMPLES - 1, size)
    assert repr(ledger) == f"StatisticsLedger({str(ledger.path)!r})"


def test_the_sums_file_does_not_grow_with_samples(folder):
    ledger = StatisticsLedger(folder)
    add(ledger, "a", 1)
    before = sum_file(ledger).stat().st_size
    ledger.add("b", statistics_of(range(100, 1100)))
    assert abs(sum_file(ledger).stat().st_size - before) < 100
    assert ledger.statistics().digests is None


def test_the_stored_files_are_files_of_statistics(ledger):
    stored = [load_statistics(file) for file in shard_folder(ledger).iterdir()]
    for seed in (1, 2):
        (found,) = [one for one in stored if one == some_statistics(seed)]
        assert found.digests is not None


# Refusals, which change nothing


OTHER = {
    "anchor": (dataclasses.replace(META, anchor="b" * 64, basis="c" * 64), {}, "another anchor"),
    "basis": (dataclasses.replace(META, basis="d" * 64), {}, "another basis"),
    "loss": (dataclasses.replace(META, basis="c" * 64, loss="MSELoss"), {}, "another loss"),
    "classes": (STATISTICS_META.delta, {"classes": ("a", "b", "c")}, "another list of classes"),
    "weights": (
        STATISTICS_META.delta,
        {"class_weights": (1.0, 1.0, 2.0)},
        "another set of class weights",
    ),
    "bits": (STATISTICS_META.delta, {"fraction_bits": 20}, "another number of fraction bits"),
    "layout": (
        STATISTICS_META.delta,
        {"layout": (("cores", "float32", (5,)), *STATISTICS_META.layout[1:])},
        "another layout",
    ),
}


@pytest.mark.parametrize(("delta", "options", "message"), OTHER.values(), ids=OTHER)
def test_refuses_statistics_that_do_not_fit(ledger, delta, options, message):
    meta = dataclasses.replace(STATISTICS_META, delta=delta, **options)
    other, sample = some_statistics(3, meta), statistics_of(numbers_of(1)[:1], meta)
    work = partial(ledger.add, "c", other)
    refused(ledger, f"shard 'c' has {message}", work, error=StatisticsError)
    refused(ledger, message, lambda: ledger.forget_samples("a", sample), error=StatisticsError)


def test_an_emptied_ledger_keeps_what_it_accepts(ledger):
    ledger.forget("a")
    ledger.forget_samples("b", some_statistics(2))
    assert ledger.verify() == VerifiedStatistics(0, 0, 0)
    meta = dataclasses.replace(STATISTICS_META, classes=("a", "b", "c"))
    add_other = partial(ledger.add, "c", some_statistics(3, meta))
    refused(ledger, "another list of classes", add_other, error=StatisticsError)
    ledger.rebuild()
    refused(ledger, "another list of classes", add_other, error=StatisticsError)
    add(ledger, "c", 3)
    assert_has(ledger, numbers_of(3))


def test_refuses_samples_that_are_not_in_the_shard(ledger):
    for gone in (numbers_of(2)[:1], [*numbers_of(1), 99]):
        work = partial(ledger.forget_samples, "a", statistics_of(gone))
        refused(ledger, "shard 'a': 1 of the", work, error=StatisticsError)
    work = partial(ledger.forget_samples, "c", some_statistics(1))
    refused(ledger, "'c' is not in the ledger", work)


def test_refuses_samples_that_cannot_be_looked_up(ledger):
    gone = statistics_of(numbers_of(1)[:1])
    work = partial(ledger.forget_samples, "a", gone.without_list())
    refused(ledger, "without a list of samples", work, error=StatisticsError)
    ledger.add("sums", some_statistics(3).without_list())
    work = partial(ledger.forget_samples, "sums", statistics_of(numbers_of(3)[:1]))
    refused(ledger, "forget it as a whole", work, error=StatisticsError)
    ledger.forget("sums")
    assert_has(ledger, [*numbers_of(1), *numbers_of(2)])


def test_refuses_what_is_no_statistic(ledger, tmp_path):
    for wrong in ({"w": torch.ones(1)}, 3, None):
        works = [lambda w=wrong: ledger.add("c", w), lambda w=wrong: ledger.forget_samples("a", w)]
        refused(ledger, "must be TangentStatistics or a path", *works, error=ArgumentError)
    none = TangentStatistics.zero(STATISTICS_META)
    work = partial(ledger.forget_samples, "a", none)
    refused(ledger, "no samples", work, error=ArgumentError)
    tangent_ops.save_delta({"w": torch.ones(1)}, tmp_path / "delta", meta=META)
    work = partial(ledger.add, "c", tmp_path / "delta")
    refused(ledger, "not a file of statistics", work, error=StatisticsFileError)


def test_refuses_a_sum_beyond_the_range(folder):
    ledger = StatisticsLedger(folder)
    large = some_statistics(1)
    large.reach = 2**62
    ledger.add("a", large)
    other = some_statistics(2)
    other.reach = 2**62
    refused(folder, "out of range", lambda: ledger.add("b", other), error=StatisticsError)
    ledger.forget("a")
    ledger.add("b", other)
    assert ledger.verify().samples == SAMPLES


# The anchor, and the other kind


def test_a_fingerprint_fixes_the_anchor(folder):
    StatisticsLedger(folder, anchor="a" * 64)
    other = dataclasses.replace(META, anchor="b" * 64, basis="c" * 64)
    wrong = some_statistics(3, dataclasses.replace(STATISTICS_META, delta=other))
    work = partial(StatisticsLedger(folder).add, "a", wrong)
    refused(folder, "another anchor: b{12}, the ledger's is a{12}", work, error=StatisticsError)
    add(StatisticsLedger(folder), "a", 1)
    work = partial(StatisticsLedger, folder, anchor="b" * 64)
    refused(folder, "another anchor", work, error=StatisticsError)
    with pytest.raises(ArgumentError, match="got a Linear"):
        StatisticsLedger(folder, anchor=nn.Linear(1, 1))


def test_a_model_fixes_anchor_basis_and_layout(folder, tangent, data):
    ledger = StatisticsLedger(folder, anchor=tangent)
    fewer = tangent_ops.linearize(tangent.anchor, "2")
    low = tangent_ops.linearize(tangent.anchor, rank=1)
    for model, message in ((fewer, r"another layout: 0\.bias missing"), (low, "another basis")):
        work = partial(ledger.add, "a", of(model, data, [0]))
        refused(folder, message, work, error=StatisticsError)
    ledger.add("a", of(tangent, data, [0]))
    before = tree(folder)
    StatisticsLedger(folder, anchor=tangent)
    assert tree(folder) == before
    work = partial(StatisticsLedger, folder, anchor=fewer)
    refused(folder, "another layout", work, error=StatisticsError)


def test_a_ledger_is_opened_as_what_it_is(tmp_path):
    add(StatisticsLedger(tmp_path / "statistics"), "a", 1)
    add(Ledger(tmp_path / "deltas"), "a", 1)
    for create in (True, False):
        works = [partial(Ledger, tmp_path / "statistics", create=create)]
        refused(tmp_path, r"is a StatisticsLedger, not a Ledger.*tangent_ops\.Stat", *works)
        works = [partial(StatisticsLedger, tmp_path / "deltas", create=create)]
        refused(tmp_path, r"is a Ledger, not a StatisticsLedger.*tangent_ops\.Ledger", *works)
    assert isinstance(open_ledger(tmp_path / "statistics"), StatisticsLedger)
    assert isinstance(open_ledger(tmp_path / "deltas"), Ledger)
    with pytest.raises(LedgerError, match="holds no ledger"):
        open_ledger(tmp_path / "missing")


def test_a_history_without_the_shard_is_detected(ledger):
    ledger.forget_samples("a", statistics_of(numbers_of(1)[:1]))
    ledger.verify()
    edit_database(ledger, "DELETE FROM history WHERE what = 'added' AND shard = 'a'")
    refused(ledger, "history does not match", ledger.verify)
