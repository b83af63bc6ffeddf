"""Files of statistics: what is written comes back, and damage is detected."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tangent_ops import TangentStatistics, load_statistics, save_delta, save_statistics
from tangent_ops.composition.statistics import StatisticsMeta
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import ArgumentError, StatisticsError, StatisticsFileError

DELTA = DeltaMeta("a" * 64, "tiny", "head", loss="square", basis="c" * 64)
LAYOUT = (("core", "float32", (4,)), ("head.weight", "float32", (3, 2)))
META = StatisticsMeta(DELTA, LAYOUT, ("head.weight",), 3, ("x", "y", "ü"), (1.0, 0.5, 2.0))


@pytest.fixture
def statistics():
    torch.manual_seed(0)
    terms = {n: torch.randint(-(2**61), 2**61, shape) for n, shape in META.shapes().items()}
    for name in ("core_core", "head_head"):
        terms[name] = terms[name].triu() + terms[name].triu(1).T
    digests = torch.randint(2**62, (6, 2)).sort(0).values
    return TangentStatistics(META, terms, torch.tensor([1, 2, 3]), 2**61 + 5, digests)


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_saved_comes_back(statistics, tmp_path, listed):
    statistics = statistics if listed else statistics.without_list()
    path = tmp_path / "statistics"
    save_statistics(statistics, path)
    found = load_statistics(str(path))
    assert found.meta == META and found.reach == statistics.reach
    for name, term in statistics.terms.items():
        assert torch.equal(found.terms[name], term)
    assert torch.equal(found.counts, statistics.counts)
    if listed:
        assert torch.equal(found.digests, statistics.digests)
    else:
        assert found.digests is None
    content = path.read_bytes()
    save_statistics(found, path)  # over the file, with the same bytes
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["statistics"]


def test_any_changed_byte_is_detected(statistics, tmp_path):
    path = tmp_path / "statistics"
    save_statistics(statistics, path)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            found = load_statistics(path)
        except StatisticsFileError:
            continue
        pytest.fail(f"byte {position} of {len(content)} was changed, and gave {found}")
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StatisticsFileError, match="truncated"):
            load_statistics(path)


def test_other_files_are_refused(statistics, tmp_path):
    save_delta({"w": torch.ones(2)}, tmp_path / "delta", meta=DELTA)
    with pytest.raises(StatisticsFileError, match="not a file of statistics"):
        load_statistics(tmp_path / "delta")
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        load_statistics(tmp_path)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "does not exist")):
        with pytest.raises(ArgumentError, match=message):
            save_statistics(statistics, path)


def test_a_later_format_is_refused(statistics, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tangent_ops.composition.statistics_file.FORMAT_VERSION", "2")
        save_statistics(statistics, tmp_path / "later")
    with pytest.raises(StatisticsFileError, match=r"format version 2.*update"):
        load_statistics(tmp_path / "later")


def contradict(what, statistics):
    if what == "counts":
        statistics.counts[0] = -1
    elif what == "list":
        statistics.digests = statistics.digests[1:]
    else:
        statistics.reach = {"reach": 2**60, "range": 2**63}[what]


@pytest.mark.parametrize("what", ["counts", "list", "reach", "range"])
def test_parts_that_contradict_each_other_are_refused(statistics, tmp_path, what, monkeypatch):
    contradict(what, statistics)
    save = partial(save_statistics, statistics, tmp_path / "statistics")
    with pytest.raises(StatisticsError, match="contradicts itself"):
        save()
    with monkeypatch.context() as patch:  # a file of another program, with a hash that is right
        patch.setattr("tangent_ops.composition.statistics_file.check_statistics", lambda *_: None)
        save()
    with pytest.raises(StatisticsFileError, match="contradicts itself"):
        load_statistics(tmp_path / "statistics")


def test_only_statistics_are_saved(tmp_path):
    with pytest.raises(ArgumentError, match="must be TangentStatistics, got a dict"):
        save_statistics({"w": torch.ones(1)}, tmp_path / "x")  # type: ignore[arg-type]
