"""`pytest benchmarks --benchmark-only` and `benchmarks.run`, on tiny suites."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest

from benchmarks import report, run
from benchmarks.stored import read
from tools.machine import ROOT

TINY = """
import time
import torch
from benchmarks.case import Case, Cost, Suite

class Doubling(Suite):
    def cases(self, device, extent):
        return [Case("doubles", "double", (4,), "fp32")] if device.type == "cpu" else []
    def inputs(self, case, device, seed):
        return torch.arange(1.0, 5.0, requires_grad=True)
    def expected(self, case, inputs):
        return (2 * inputs.detach().double(),)
    def prepare(self, provider, case, inputs):
        return lambda: (provider.answer(inputs),)
    def bound(self, case):
        return 1e-6
    def cost(self, case, provider):
        return Cost(8.0, 32.0)

SUITE = Doubling()

@SUITE.provider("ours")
def ours(x):
    time.sleep(0.002)
    return 2 * x * FACTOR

@SUITE.provider("squared", question="primal")
def squared(x):
    time.sleep(0.02)
    return (x.sqrt() ** 2) * 2

@SUITE.provider("rival")
def rival(x):
    return 3 * x

def test_doubles(provider, benchmark):
    provider.time(benchmark)

def test_plain(benchmark):
    benchmark.pedantic(time.sleep, (0.001,), rounds=2)
"""


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """pytest-benchmark times nothing in a worker of pytest-xdist, as this process may be."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def pytest_run(folder, factor: float = 1.0, *options: str) -> int:
    """Of the tiny suite, in this process, with the benchmarks' own conftest."""
    bench = folder / f"bench_{folder.name}.py"  # a module of its own
    bench.write_text(TINY.replace("FACTOR", str(factor)))
    arguments = [str(bench), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    arguments += ["-p", "benchmarks.conftest", "--benchmark-only", f"--rootdir={folder}", "-c"]
    # The conftest is imported by then, and each test has a module of this name.
    rest = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--import-mode=importlib"]
    arguments += [
        str(ROOT / "pyproject.toml"),
        *rest,
        f"--benchmark-storage=file://{folder}/storage",
    ]
    return pytest.main(arguments)


def test_pytest_benchmark_times_what_is_right(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.conftest.measure_ceilings", lambda device: {"bytes/s": 1e10})
    before = signal.getsignal(signal.SIGINT)
    file = tmp_path / "tiny.json"
    assert pytest_run(tmp_path, 1.0, f"--benchmark-json={file}", "--turns=2") == 0
    assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C still ends the session
    stored = json.loads(file.read_text())["benchmarks"]
    names = [re.sub(r".*fp32-", "", one["name"]) for one in stored]
    assert names == ["ours]", "squared]", "ours-turn-2]", "squared-turn-2]", "test_plain"]
    assert all(one["stats"]["rounds"] >= 3 and "data" not in one["stats"] for one in stored[:4])
    rows = {row.provider: row for row in read([file]).rows}
    ours, squared, rival = rows["ours"], rows["squared"], rows["rival"]
    assert 0.002 <= (ours.seconds or 0) < 0.02 <= (squared.seconds or 0)  # real times
    assert (ours.error, ours.flops, ours.bytes) == (0.0, 8.0, 32.0)
    assert 32 <= (ours.peak_bytes or 0) < 64  # two results, and scalars on the way
    assert (ours.saved_bytes, squared.saved_bytes) == (0, 16)  # the root, once
    assert (rival.status, rival.note) == ("wrong", "error 5.0e-01, allowed 1.0e-06")


def test_compared_with_an_earlier_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.conftest.measure_ceilings", lambda device: {})
    pytest_run(tmp_path, 1.0, f"--benchmark-json={tmp_path / 'tiny.json'}")
    content = json.loads((tmp_path / "tiny.json").read_text())
    for one in content["benchmarks"]:
        one["stats"]["min"] /= 2
    (tmp_path / "fast.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="Performance has regressed"):
        file = tmp_path / "fast.json"
        pytest_run(tmp_path, 1.0, f"--benchmark-compare={file}", "--benchmark-compare-fail=min:5%")


def test_a_wrong_answer_of_ours_is_red_and_has_no_time(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.conftest.measure_ceilings", lambda device: {})
    file = tmp_path / "tiny.json"
    assert pytest_run(tmp_path, 1.01, f"--benchmark-json={file}") == 1
    assert "ours: wrong: error 1.0e-02, allowed 1.0e-06" in capsys.readouterr().out
    status = {row.provider: row.status for row in read([file]).rows}
    assert status == {"squared": "ok", "ours": "wrong", "rival": "wrong"}


def test_options_out_of_range(tmp_path, capsys) -> None:
    assert pytest_run(tmp_path, 1.0, "--turns=0") == pytest.ExitCode.USAGE_ERROR
    assert "--turns=0: expected more than 0" in capsys.readouterr().err


def test_every_benchmark_is_collected() -> None:
    """By the command of the README, without -c or -p."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only"]
    command += ["-q", "-p", "no:cacheprovider", "--extent=full"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("attention_second_order", "elementwise", "linear", "train_step", "epoch"):
        assert f"::test_{name}[" in listed
    assert "test_train_step[vit_large_patch16_224-2-fp32-taft-all-compiled]" in listed


# --- benchmarks.run ------------------------------------------------------------------------------


@pytest.fixture
def suite(monkeypatch):
    """pytest writes a file with a commit; `dies` are benchmark files that end before that."""
    ran: list[str] = []
    dies: set[str] = set()

    def pytest_of(command, cwd):
        tests = command[3].rpartition("/")[2]
        ran.append(tests)
        (partial,) = (one.partition("=")[2] for one in command if "benchmark-json" in one)
        if tests in dies:
            return subprocess.CompletedProcess(command, -9)
        own = {"environment": {"commit": run.commit()}, "ceilings": {}, "not_timed": []}
        with open(partial, "w") as file:
            json.dump({"benchmarks": [], "tangent_ops": own}, file)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", pytest_of)
    monkeypatch.setattr(report, "main", lambda files: 0)
    monkeypatch.setattr(run, "commit", lambda: "0123456789ab")
    return ran, dies


def test_one_process_and_one_file(suite, tmp_path) -> None:
    assert run.main(["--out", str(tmp_path)]) == run.main(["--out", str(tmp_path)]) == 0
    assert suite[0] == ["benchmarks"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["suite.json"]


def test_a_killed_run_goes_on(suite, tmp_path, capsys, monkeypatch) -> None:
    ran, dies = suite
    dies.add("bench_models.py")
    assert run.main(["--out", str(tmp_path), "--resume"]) == 137
    assert "killed by signal 9; by 9 often for want of memory" in capsys.readouterr().err
    assert not (tmp_path / "models.json").exists() and (tmp_path / "steps.json").exists()
    dies.clear()
    ran.clear()
    assert run.main(["--out", str(tmp_path), "--resume"]) == 0
    assert ran == ["bench_models.py"]
    monkeypatch.setattr(run, "commit", lambda: "another")  # files of both would pass for one
    assert run.main(["--out", str(tmp_path), "--resume"]) == 0
    assert "bench_attention.py" in ran and len(ran) > 4


def test_out_that_is_a_file(suite, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run.main(["--out", str(tmp_path / "file")])
    assert "file: File exists; name a folder" in capsys.readouterr().err and suite[0] == []
