"""The guard: what it finds between two commits, what it refuses, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tiny_repository import ROOT, git, make_benchmarks, make_repository

from benchmarks.compare import Outcome, UsageError, choose, confirm, hidden, main, measure
from benchmarks.verdict import Verdict

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="looks for left processes in /proc"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("tiny") / "repository")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(tmp_path_factory.mktemp("suite") / "benchmarks")


@pytest.fixture(autouse=True)
def temporary(repository, tmp_path_factory, monkeypatch):
    """Where temporary files go; afterwards no file, no worktree and no process is left of them."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert processes_in(folder) == []


def processes_in(folder: Path) -> list[str]:
    """The ids of processes that work in the folder, or did before it was removed."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append(process.name)
        except OSError:  # not a process, ended, or another user's
            continue
    return found


@pytest.fixture
def run(repository, benchmarks, capfd, tmp_path):
    """Runs the command; gives its exit status, what it printed, and its outcomes by case."""

    def run_with(*argv: str):
        out = tmp_path / "out"
        usual = ["--cases", "steady", "--rounds", "7", "--tolerance", "0.3"]
        arguments = [*usual, "--tests", "tests/test_tiny.py", "--out", str(out), *argv]
        status = main(arguments, repository=repository, benchmarks=benchmarks)
        printed, errors = capfd.readouterr()
        file = out / "compare.json"
        content = json.loads(file.read_text()) if file.exists() else {"outcomes": []}
        found = {o["case"].split()[1]: o for o in content["outcomes"]}
        return argparse.Namespace(
            status=status, printed=printed, errors=errors, content=content, found=found
        )

    return run_with


# --- what it finds -------------------------------------------------------------------------------


def test_every_kind_of_change_gets_its_word(run, repository) -> None:
    done = run("--base", "base", "--head", "changed", "--cases", "tiny (?!endless)")
    assert done.status == 1
    assert {name: outcome["word"] for name, outcome in done.found.items()} == {
        "steady": "same within noise",
        "slowed": "slower",
        "hastened": "faster",
        "mistaken": "wrong",
        "broken": "failed",
        "fresh": "new",
        "lunar": "absent",
    }
    slowed = done.found["slowed"]
    assert len(slowed["base"]) == len(slowed["head"]) == 7
    assert min(slowed["base"]) >= 0.004 and min(slowed["head"]) >= 0.012  # what was planted
    assert 1.3 < slowed["verdict"]["lower"] <= slowed["verdict"]["upper"]
    assert done.found["mistaken"]["head"] == []  # never timed
    for note in ("error nan", "ValueError: no more", "no attribute 'fresh'", "needs a moon"):
        assert note in done.printed
    about = done.content["environment"]
    for name, tag in (("base", "base"), ("head", "changed")):
        assert about[name].split()[0] == git(repository, "rev-parse", tag).strip()
    assert "MALLOC_" in about["malloc"]


def test_a_slowdown_alone_is_red_and_a_speed_up_alone_is_not(run) -> None:
    done = run("--base", "base", "--head", "changed", "--cases", "slowed")
    assert (done.status, done.found["slowed"]["word"]) == (1, "slower")
    done = run("--base", "base", "--head", "changed", "--cases", "hastened")
    assert (done.status, done.found["hastened"]["word"]) == (0, "faster")
    assert "1 faster" in done.printed


def test_commits_of_the_same_code_are_the_same(run) -> None:
    done = run("--base", "base", "--cases", "steady|slowed|hastened")
    assert done.status == 0
    assert {o["word"] for o in done.found.values()} == {"same within noise"}


def test_a_base_without_what_the_suite_imports_has_nothing_to_compare(run) -> None:
    done = run("--base", "before", "--cases", "steady|slowed")
    assert done.status == 0
    assert {o["word"] for o in done.found.values()} == {"new"}
    assert "base cannot load the suite: ImportError" in done.printed
    # ... and does not hide what is wrong now.
    assert run("--base", "before", "--head", "changed", "--cases", "mistaken").status == 1


def test_red_tests_at_head_keep_every_number_back(run) -> None:
    done = run("--base", "base", "--head", "red", "--cases", "hastened")
    assert done.status == 3
    assert "FAILED tests/test_tiny.py::test_fact" in done.errors
    assert "test_own_sources" not in done.errors
    assert "To see them: git worktree add" in done.errors
    assert "ratio" not in done.printed + done.errors and done.found == {}


def test_the_other_provider_when_it_is_named(run) -> None:
    done = run("--base", "base", "--cases", "steady", "--providers", "rival")
    assert done.found["steady"]["provider"] == "rival"


def test_uncommitted_changes_are_named_as_not_measured(run, repository) -> None:
    file = repository / "tangent_ops" / "later.py"
    file.write_text("")
    try:
        done = run("--base", "base")
    finally:
        file.unlink()
    assert "not measured: tangent_ops/later.py" in done.printed


class FakeWorker:
    """Answers at once, and notes who was asked."""

    def __init__(self, name: str, log: list[str], seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, seconds

    def ask(self, do: str, *arguments: str) -> dict:
        if do == "prepare":
            return {"status": "ok", "note": ""}
        self.log.append(self.name)
        return {"seconds": self.seconds}


def test_who_goes_first_changes_every_round() -> None:
    log: list[str] = []
    args = argparse.Namespace(rounds=6, tolerance=0.03)
    before, after = FakeWorker("A", log, 1.0), FakeWorker("B", log, 2.0)
    outcome = measure("case", "ours", before, after, "", args)
    assert "".join(log) == "ABBA" * 3
    assert (outcome.base, outcome.head) == ((1.0,) * 6, (2.0,) * 6)


@pytest.mark.parametrize(
    ("first", "again", "word"),
    [
        (2.0, 2.1, "slower"),
        (2.0, 1.0, "same within noise"),  # the luck of one pair of processes
        (0.5, 0.5, "faster"),
        (0.5, 1.0, "same within noise"),
        (0.5, 2.0, "slower"),  # in doubt it is looked at
    ],
)
def test_a_change_counts_once_a_second_pair_finds_it(first, again, word) -> None:
    args = argparse.Namespace(rounds=6, tolerance=0.03)
    pairs = [(FakeWorker("A", [], 1.0), FakeWorker("B", [], s)) for s in (first, again)]
    outcome = measure("case", "ours", *pairs[0], "", args)
    confirmed = confirm(outcome, *pairs[1], args)
    assert confirmed.word == word and confirmed.bad == (word == "slower")
    assert ("another pair's" in confirmed.note) == (word != outcome.word)


def test_it_says_what_the_noise_could_hide() -> None:
    def same(upper: float) -> Outcome:
        return Outcome(
            "c", "ours", "same within noise", "", Verdict("same within noise", 1, 1, upper)
        )

    slower = Outcome("c", "ours", "slower", "", Verdict("slower", 9, 8, 10))
    new = Outcome("c", "ours", "new", "why")
    assert "up to 25.0%" in hidden([same(1.1), same(1.25), slower, new], tolerance=0.03)
    assert hidden([same(1.02), slower, new], tolerance=0.03) == hidden([], tolerance=0.03) == ""


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base", "nowhere"], "--base nowhere: no such commit .*rev-parse: fatal: "),
        (["--base", "base", "--head", "lost"], "--head lost: no such commit"),
        (["--base", "twin"], "are both commit .* nothing to compare"),
        (["--base", "base", "--rounds", "4"], "--rounds 4: fewer than 5"),
        (["--base", "base", "--tolerance", "-0.1"], "--tolerance -0.1: a fraction from 0 on"),
        (["--base", "base", "--cases", "("], r"--cases '\(' is no regular expression"),
        (["--base", "base", "--cases", "none"], "--cases 'none' is found in no case.* tiny steady"),
        (["--base", "base", "--providers", "x"], "--providers x: no .* there are: ours, rival"),
        (["--base", "base", "--tests", "tests/no.py"], "--tests tests/no.py: the head has no such"),
        (["--base", "base", "--tests", "/tmp"], "--tests /tmp: .* relative to the repository's"),
        (["--base", "base", "--tests", "torch.py"], "--tests torch.py: nothing was run"),
        pytest.param(
            ["--base", "base", "--device", "cuda"],
            "--device cuda: .* name --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--base", "base", "--out", __file__], "--out .*: that is a file"),
        (["--base", "base", "--head", "before"], "--head before cannot load the suite: ImportErr"),
        (["--base", "base", "--head", "headless"], "no package tangent_kernels of its own"),
    ],
)
def test_a_clear_error(run, argv, message) -> None:
    done = run(*argv)
    assert done.status == 2
    assert done.errors.startswith("compare: ")
    assert re.search(message, done.errors)
    assert "Traceback" not in done.errors and "ratio" not in done.printed


def test_a_folder_that_is_no_checkout(benchmarks, tmp_path, repository, capfd) -> None:
    inside = repository / "tests"
    for folder in (tmp_path, inside):
        assert main(["--base", "base"], repository=folder, benchmarks=benchmarks) == 2
        assert f"{folder} is not a git checkout" in capfd.readouterr().err


def test_a_worker_that_dies_says_its_last_words(run) -> None:
    done = run("--base", "base", "--head", "crashing")
    assert done.status == 2
    assert "exit status 7" in done.errors and "`prepare tiny steady 1x1 ours`" in done.errors
    assert "out of luck" in done.errors
    done = run("--base", "crashing", "--head", "twin")
    assert done.status == 2
    assert "worker of base" in done.errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_cleans_up(number, repository, benchmarks, temporary, tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.compare import *\n"
        "stop_by_exception(); sys.exit(main(sys.argv[3:], "
        "repository=Path(sys.argv[1]), benchmarks=Path(sys.argv[2])))"
    )
    argv = ["--base", "base", "--head", "changed", "--cases", "endless"]
    argv += ["--tests", "tests/test_tiny.py"]
    sources = os.pathsep.join(map(str, (repository, ROOT)))  # the tiny torch is quick to import
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(repository), str(benchmarks), *argv],
        cwd=ROOT,
        env=dict(os.environ) | {"PYTHONPATH": sources, "TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and "Tests of head" in process.stdout.readline()
        deadline = time.monotonic() + 30
        while not processes_in(temporary) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes_in(temporary) != []
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
    finally:
        process.kill()
        process.communicate()


# --- what is chosen ------------------------------------------------------------------------------

LISTING = {
    "linear l 8": ["ours", "torch"],
    "model m 2": ["plain", "taft-1"],
    "other o 1": ["a", "b"],
}


@pytest.mark.parametrize(
    ("pattern", "names", "chosen"),
    [
        ("linear|model", None, [("linear l 8", "ours"), ("model m 2", "taft-1")]),
        ("^other o", None, [("other o 1", "a")]),
        ("", ["torch", "b"], [("linear l 8", "torch"), ("other o 1", "b")]),
    ],
)
def test_what_is_chosen(pattern, names, chosen) -> None:
    assert choose(LISTING, pattern, names) == chosen


def test_an_error_lists_some_cases_and_not_all() -> None:
    with pytest.raises(UsageError, match=r"case 0, .* and 92 more"):
        choose({f"case {index}": ["ours"] for index in range(100)}, "none", None)
