"""The command `tangent-ops ledger`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import cli_runs
import pytest
import torch
from cli_runs import complaint, parsed, refused
from torch.utils.data import Subset, TensorDataset

from tangent_ops import (
    Delta,
    DeltaMeta,
    Ledger,
    StatisticsLedger,
    TangentStatistics,
    linearize,
    load_delta,
    save_delta,
    save_statistics,
    statistics,
)
from tangent_ops.cli.messages import INTERRUPTED

META = DeltaMeta("a" * 64, "tiny", "head", loss="square")


run = partial(cli_runs.run, "ledger")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_delta({"w": torch.tensor([1.0, 2.0])}, tmp_path / "delta", meta=META)
    return tmp_path / "delta"


@pytest.fixture
def ledger(folder: Path, file: Path) -> Ledger:
    ledger = Ledger(folder)
    ledger.add("a", file, meta={"who": "[Ada]", "n": 1})
    ledger.add("b", Delta({"w": torch.tensor([3.0, 0.0])}, META), weight=3)
    return ledger


def test_add_makes_the_ledger(folder: Path, file: Path) -> None:
    result = run("add", folder, "a", file, "--weight", "2.5", "--meta", "who=Ada", "--meta", "x==")
    assert (result.exit_code, result.stdout) == (0, "added a\n")
    (entry,) = Ledger(folder, create=False).list()
    assert (entry.shard, entry.weight, entry.meta) == ("a", 2.5, {"who": "Ada", "x": "="})


def test_add_makes_no_ledger_for_a_missing_file(folder: Path, tmp_path: Path) -> None:
    assert run("add", folder, "a", tmp_path / "missing").exit_code == 2
    assert not folder.exists()


def test_forget(ledger: Ledger) -> None:
    result = run("forget", ledger.path, "a")
    assert (result.exit_code, result.stdout) == (0, "forgot a\n")
    assert "a" not in ledger


def test_forget_without_the_file(ledger: Ledger) -> None:
    for path in (ledger.path / "deltas").iterdir():
        if b"Ada" in path.read_bytes():
            path.unlink()
    result = run("forget", ledger.path, "a")
    assert result.exit_code == 2
    assert "is missing" in result.stderr and "--rebuild" in result.stderr
    assert run("forget", ledger.path, "a", "--rebuild").exit_code == 0
    assert ledger.verify().shards == 1


def test_list_shows_a_table(ledger: Ledger) -> None:
    result = run("list", ledger.path, COLUMNS="120")
    assert result.exit_code == 0
    assert re.search(r"a +│ 1 +│ \S+ +│ n=1, who=\[Ada\]", result.stdout)
    assert re.search(r"b +│ 3 ", result.stdout)


def test_list_as_json(ledger: Ledger) -> None:
    found = parsed(run("list", ledger.path, "--json"))
    assert [(one["shard"], one["weight"]) for one in found] == [("a", 1), ("b", 3)]
    assert found[0]["meta"] == {"who": "[Ada]", "n": 1}


def test_history(ledger: Ledger) -> None:
    ledger.forget("a")
    found = parsed(run("list", ledger.path, "--history", "--json"))
    assert [(one["what"], one["shard"]) for one in found] == [
        ("added", "a"), ("added", "b"), ("forgotten", "a"),
    ]  # fmt: skip
    assert "forgotten" in run("list", ledger.path, "--history").stdout


def test_verify(ledger: Ledger) -> None:
    result = run("verify", ledger.path)
    assert (result.exit_code, result.stdout) == (0, "shards in order: 2; weight 4; 0.0 MB\n")


def test_a_failed_verification_exits_with_1(ledger: Ledger) -> None:
    (path,) = (ledger.path / "sums").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    result = run("verify", ledger.path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "ledger verify --rebuild" in result.stderr
    assert run("verify", ledger.path, "--rebuild").exit_code == 0
    assert run("verify", ledger.path).exit_code == 0


def test_export(ledger: Ledger, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    result = run("export", ledger.path, out)
    assert (result.exit_code, result.stdout) == (0, f"wrote {out}\n")
    mean = load_delta(out)
    assert mean["w"].tolist() == [2.5, 0.5] and mean.meta == META

    out.write_text("precious")
    refused(run("export", ledger.path, out), "--force")
    assert out.read_text() == "precious"
    assert run("export", ledger.path, out, "--force").exit_code == 0
    assert load_delta(out).meta == META


def test_an_unknown_anchor_cannot_be_exported(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add("plain", {"w": torch.ones(2)})
    refused(run("export", ledger.path, tmp_path / "mean"), "unknown anchor")
    assert not (tmp_path / "mean").exists()


# Words around the folder -> a pattern of the message.
REFUSED = {
    "add a {file}": "shard 'a' is in the ledger already",
    "add c {file} --weight 0": "--weight must be finite and positive",
    "add c {file} --meta who": "--meta who: expected key=value",
    "add c {file}.missing": ".*there is no such file",
    "add c {folder}/ledger.sqlite": ".*no safetensors file",
    "forget c": "shard 'c' is not in the ledger. Its shards are 'a', 'b'",
    "forget A": "shard 'A' is not in the ledger: did you mean 'a'?",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_bad_input_is_refused(words: str, message: str, ledger: Ledger, file: Path) -> None:
    command, *rest = (word.format(file=file, folder=ledger.path) for word in words.split())
    assert re.match(message, complaint(run(command, ledger.path, *rest)))
    assert [entry.shard for entry in ledger.list()] == ["a", "b"]


@pytest.mark.parametrize("command", ["forget", "list", "verify", "export"])
def test_only_add_makes_a_ledger(command: str, tmp_path: Path) -> None:
    words = {"forget": ["a"], "export": [str(tmp_path / "mean")]}.get(command, [])
    for folder in (tmp_path / "missing", tmp_path):
        refused(run(command, folder, *words), "holds no ledger")
    assert list(tmp_path.iterdir()) == []


# Words -> what is interrupted (the change, or what comes after it) -> what is said.
INTERRUPTIONS = {
    "add c {file}": ("c is not in it: the same command adds it", "c is in the ledger"),
    "forget a": ("a is in the ledger as before: the same", "a is not in the ledger"),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("words", INTERRUPTIONS)
def test_ctrl_c_says_whether_the_change_is_made(
    words: str, after: bool, ledger: Ledger, file: Path, monkeypatch
) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command, *rest = words.format(file=file).split()
    patched = "cli.ledger.say" if after else f"composition.ledger.Ledger.{command}"
    monkeypatch.setattr(f"tangent_ops.{patched}", interrupted)
    refused(run(command, ledger.path, *rest), INTERRUPTIONS[words][after], INTERRUPTED)
    made = {"add": ["a", "b", "c"], "forget": ["b"]}[command]
    assert [entry.shard for entry in ledger.list()] == (made if after else ["a", "b"])


# A ledger of statistics


@pytest.fixture
def sums(folder: Path, tmp_path: Path) -> StatisticsLedger:
    """The shard "a", of three samples of which one is in the file "gone"."""
    for name, indices in (("gone", [1]), ("whole", [0, 1, 2])):
        save_statistics(statistics_of(indices), tmp_path / name)
    result = run("add", folder, "a", tmp_path / "whole", "--meta", "who=Ada")
    assert (result.exit_code, result.stdout) == (0, "added a\n")
    return StatisticsLedger(folder, create=False)


def statistics_of(indices: list[int]) -> TangentStatistics:
    torch.manual_seed(0)
    tangent = linearize(torch.nn.Linear(2, 2))
    data = TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
    return statistics(tangent, Subset(data, indices), progress=False)


def test_statistics_are_listed_and_verified(sums: StatisticsLedger, tmp_path: Path) -> None:
    table = run("list", sums.path, COLUMNS="120").stdout
    assert re.search(r"samples(.|\n)*a +│ 3 +│ \S+ +│ who=Ada", table)
    assert parsed(run("list", sums.path, "--json"))[0]["samples"] == 3
    assert run("verify", sums.path).stdout == "shards in order: 1; 3 samples; 0.0 MB\n"
    found = parsed(cli_runs.run("inspect", sums.path, "--json"))
    assert found == {"what": "ledger of statistics", "shards": 1, "samples": 3}


def test_samples_are_forgotten(sums: StatisticsLedger, tmp_path: Path) -> None:
    result = run("forget", sums.path, "a", "--samples", tmp_path / "gone")
    assert (result.exit_code, result.stdout) == (0, "forgot samples of a\n")
    assert sums.statistics() == statistics_of([0, 2])
    events = parsed(run("list", sums.path, "--history", "--json"))
    assert [event["what"] for event in events] == ["added", "samples forgotten"]
    refused(run("forget", sums.path, "a", "--samples", tmp_path / "gone"), "samples to take out")
    assert run("forget", sums.path, "a").exit_code == 0
    assert len(sums) == 0


def test_ctrl_c_says_whether_samples_are_forgotten(
    sums: StatisticsLedger, tmp_path: Path, monkeypatch
) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for patched, said in (
        ("composition.ledger.StatisticsLedger.forget_samples", "a is in the ledger as before"),
        ("cli.ledger.say", "the samples are out of a, which has 2 left"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"tangent_ops.{patched}", interrupted)
            result = run("forget", sums.path, "a", "--samples", tmp_path / "gone")
        refused(result, said, INTERRUPTED)
    assert sums.statistics() == statistics_of([0, 2])


def test_statistics_and_deltas_do_not_mix(
    sums: StatisticsLedger, file: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    refused(run("add", sums.path, "b", file), "is a StatisticsLedger")
    refused(run("add", sums.path, "b", whole, "--weight", "2"), "--weight is for deltas")
    assert run("add", tmp_path / "deltas", "a", file).exit_code == 0
    refused(run("add", tmp_path / "deltas", "b", whole), "is a Ledger")
    words = ("forget", tmp_path / "deltas", "a", "--samples", whole)
    refused(run(*words), "--samples is for a ledger of statistics")


def test_export_solves_for_the_optimum(folder: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tangent = linearize(torch.nn.Linear(3, 2))
    for name in ("a", "b"):
        inputs, targets = torch.randn(5, 3, generator=draw), torch.randn(5, 2, generator=draw)
        found = statistics(
            tangent,
            TensorDataset(inputs, targets),
            loss=torch.nn.MSELoss(),
            progress=False,
        )
        save_statistics(found, tmp_path / name)
        assert run("add", folder, name, tmp_path / name).exit_code == 0
    assert run("forget", folder, "a").exit_code == 0
    assert run("export", folder, tmp_path / "delta-b", "--l2", 0.5).exit_code == 0
    assert run("export", folder, tmp_path / "chosen").exit_code == 0
    expected = StatisticsLedger(folder, create=False).solve(0.5)  # of b alone
    solved = load_delta(tmp_path / "delta-b")
    assert all(torch.equal(solved[name], expected[name]) for name in expected)
    # The oracle: ridge regression of b's five samples in float64, with λ = l2 N C / 2.
    rows = torch.cat([inputs, torch.ones(5, 1)], dim=1).double()
    with torch.no_grad():
        residuals = (targets - tangent.anchor(inputs)).double()
    gram = rows.T @ rows + 0.5 * 5 * torch.eye(4, dtype=torch.float64)
    both = torch.linalg.solve(gram, rows.T @ residuals).T
    torch.testing.assert_close(solved["weight"], both[:, :3].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(solved["bias"], both[:, 3].float(), rtol=1e-4, atol=1e-5)


def test_l2_is_for_statistics(ledger: Ledger, tmp_path: Path) -> None:
    refused(run("export", ledger.path, tmp_path / "x", "--l2", 1), "--l2 is for statistics")
