"""The GPU check: steps that end, fail or take too long, what is kept of them; and a rehearsal."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from tools import rehearsal
from tools.gpu_check import __main__ as command
from tools.gpu_check import runner, summary
from tools.gpu_check.parts import PARTS
from tools.gpu_check.step import Outcome, Step
from tools.machine import ROOT


def program(name: str, text: str, seconds: float = 60) -> Step:
    return Step(name, [sys.executable, "-c", text], seconds)


def kept(archive: Path) -> dict[str, str]:
    """Contents by name, without the folder."""
    with tarfile.open(archive) as file:
        members = [(one, file.extractfile(one)) for one in file if one.isfile()]
        return {
            one.name.partition("/")[2]: content.read().decode(errors="replace")
            for one, content in members
            if content
        }


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 3.0)
    monkeypatch.setattr(runner, "SAVED_EVERY", 0.1)
    monkeypatch.setattr(runner, "LEAST", 0.5)


WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('found')"
# As pytest does: what was found until the interrupt is written.
WRITES_IF_INTERRUPTED = """
import pathlib, time
print("started", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path("{out}", "interrupted.json").write_text("kept")
"""


def test_a_step_that_fails_or_is_cut_does_not_stop_the_others(tmp_path, capsys) -> None:
    steps = [
        Step("writes", [sys.executable, "-c", WRITES, "{out}/result.json"], 60),
        program("fails", "print('what was wrong'); raise SystemExit(3)"),
        program("is slow", WRITES_IF_INTERRUPTED, 1.0),
        Step("missing tool", ["no-such-tool"], 60),
        program("last", "print('here')"),
    ]
    assert runner.run("smoke", steps, tmp_path, runner.USUAL) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.tar.gz"]
    files = kept(tmp_path / "smoke.tar.gz")
    assert files["result.json"] == "found" and files["interrupted.json"] == "kept"
    assert files["fails.log"] == "what was wrong\n" and files["last.log"] == "here\n"
    states = [one["state"] for one in json.loads(files["steps.json"])]
    assert states == [
        "ok",
        "failed (exit status 3)",
        "cut after 1 s",
        "not started: no-such-tool is not installed",
        "ok",
    ]
    shown = capsys.readouterr()
    assert "what was wrong" in shown.err
    assert shown.out.count("cut after 1 s") == 2 and "cut after 1 s" in files["summary.txt"]


def test_all_well(tmp_path) -> None:
    says = [sys.executable, "-c", "import os; print(os.environ['WHERE'])"]
    step = Step("one", says, 60, {"WHERE": "{out}/x"})
    assert runner.run("models", [step], tmp_path, runner.USUAL) == 0
    assert re.fullmatch(
        r"/.*/gpu-check-models-\w+/x\n", kept(tmp_path / "models.tar.gz")["one.log"]
    )


def test_without_time_a_step_is_not_started(tmp_path) -> None:
    """The last step's share is not enough for it; a shorter part has shorter steps."""
    steps = [program("slow", "import time; time.sleep(60)", runner.USUAL), program("next", "")]
    start = time.monotonic()
    assert runner.run("tests", steps, tmp_path, runner.GRACE + 1.2) == 1
    assert time.monotonic() - start < 10
    states = json.loads(kept(tmp_path / "tests.tar.gz")["steps.json"])
    assert [one["state"] for one in states] == ["cut after 1 s", "not started: no time is left"]


def test_processes_that_a_step_has_started_end_with_it(tmp_path) -> None:
    """Also those that ignore an interrupt, as the step itself does."""
    child = "import time; print('child', flush=True); time.sleep(60)"
    text = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid, flush=True)
time.sleep(60)
"""
    runner.run("tests", [program("stubborn", text, 1.5)], tmp_path, runner.USUAL)
    pid = int(kept(tmp_path / "tests.tar.gz")["stubborn.log"].split()[0])
    end = time.monotonic() + 20  # on a busy machine a killed process goes on for a moment
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_check_leaves_what_it_had(tmp_path) -> None:
    sleeps = "import time; print(1, flush=True); time.sleep(60)"
    steps = [program("ends", "print('whole')"), program("runs", sleeps)]
    arguments = ("tune", steps, tmp_path, runner.USUAL)
    check = multiprocessing.get_context("fork").Process(target=runner.run, args=arguments)
    check.start()
    archive = tmp_path / "tune.tar.gz"
    try:
        deadline = time.monotonic() + 60
        while not (archive.exists() and kept(archive).get("runs.log") == "1\n"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(check.pid or 0, signal.SIGINT)  # so that the step ends, too
        check.join()
    files = kept(archive)
    assert (files["ends.log"], files["runs.log"]) == ("whole\n", "1\n")
    assert json.loads(files["steps.json"])[0]["state"] == "ok"


# --- the command ---------------------------------------------------------------------------------


def test_it_needs_one_gpu(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["smoke", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA device, and torch finds none here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert command.main(["smoke", "--out", str(tmp_path)]) == 2
    assert "torch finds 4: name one, as by CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_parts_in_turn(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command, "_without_one_gpu", lambda: None)
    ran = []

    def run(part, steps, out, seconds) -> int:
        ran.append((part, steps, out, seconds))
        return int(part == "tune")

    monkeypatch.setattr(command, "run", run)
    assert command.main(["tune", "smoke", "--out", str(tmp_path / "new")]) == 1
    assert ran == [(part, PARTS[part], tmp_path / "new", 540.0) for part in ("tune", "smoke")]
    (tmp_path / "file").write_text("")
    wrong = [
        (["rest", "--out", "x"], "invalid choice: 'rest'"),
        (["smoke"], "--out"),
        (["smoke", "--out", str(tmp_path / "file")], "File exists; name a folder"),
        (["smoke", "--out", str(tmp_path), "--minutes=0"], "--minutes=0: expected more than 0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err
    assert len(ran) == 2


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_time_for_its_steps(part: str) -> None:
    """All but the last: limits are generous, and the most valuable steps come first."""
    *first, _ = PARTS[part]
    assert sum(step.seconds for step in first) <= runner.USUAL - 20
    names = [step.name for step in PARTS[part]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z ]+", name) for name in names)


def test_the_summary_says_what_went_wrong(tmp_path) -> None:
    """With half of the files, as a part leaves them that is cut."""
    said = "FAILED tests/test_one.py::test_it - assert 1 == 2\n1 failed, 2 passed in 3.00s\n"
    (tmp_path / "tests.log").write_text("noise\n" + said)
    row = {"group": "linear", "case": "gelu 4x4 bf16", "allowed": 2e-2}
    rows = [
        row | {"status": "ok", "error": 1e-3, "note": ""},
        row | {"status": "wrong", "error": None, "note": "error 3.0e-01, allowed 2.0e-02"},
    ]
    (tmp_path / "numerics.json").write_text(json.dumps(rows))
    (tmp_path / "host.json").write_text(json.dumps({"torch.add": 2e-6, "gelu, forward": 6e-5}))
    case = {"group": "attention-forward", "op": "attention", "shape": [64, 12, 197, 64]}
    case |= {"dtype": "bf16", "causal": False}
    timed = {"ours": (1.5e-4, 1e9), "sdpa-flash": (1e-4, 0.0)}
    benchmarks = [
        {
            "extra_info": {"case": case, "provider": name, "flops": flops, "bytes": 1e5},
            "stats": dict.fromkeys(("median", "q1", "q3"), seconds),
        }
        for name, (seconds, flops) in timed.items()
    ]
    own = {
        "environment": {"gpu": "example"},
        "ceilings": {"bytes/s": 1e12, "flops/s bf16": 1e14},
        "not_timed": [
            {"case": case, "provider": "torch-jvp", "status": "failed", "note": "out of memory"}
        ],
    }
    content = {"benchmarks": benchmarks, "tangent_ops": own}
    (tmp_path / "suite-one.json").write_text(json.dumps(content))
    text = summary.text("smoke", [Outcome("numerics", "failed (exit status 1)", 3.0)], tmp_path)
    lines = [re.sub(" +", " ", line.strip()) for line in text.splitlines()]
    assert said.strip() in text and "noise" not in text
    assert "wrong: linear gelu 4x4 bf16: error 3.0e-01, allowed 2.0e-02" in lines
    assert "numerics: 1 of 2 right" in lines
    assert "gelu, forward 60.0 30.0" in lines
    # 1e9 operations at 1e14 a second take 10 µs, 7 % of 150.
    assert "attention 64x12x197x64 bf16 150 µs - 7 0.667" in lines
    name = "torch-jvp, attention-forward attention 64x12x197x64 bf16"
    assert f"{name}: failed: out of memory" in lines
    met = [line for line in lines if "B64 H12 N197" in line]
    assert met and "1.500 met" in met[0] and "ViT-S" not in text
    assert "numerics failed (exit status 1) 3" in lines


# --- on the rehearsal ----------------------------------------------------------------------------

FILES = {
    "smoke": {"machine.json", "numerics.json", "report.txt", "suite-attention-backward.json"},
    "tune": {
        "suite-before.json",
        "suite-after.json",
        "kernels/tangent_kernels/attention/timings.json",
        "kernels/tangent_kernels/attention/configs.json",
    },
    "models": {"host.json", "suite-base.json", "suite-small-compiled.json", "report.txt"},
    "tests": {"tests.log", "memcheck.log", "racecheck.log"},
}


@pytest.mark.long
@pytest.mark.skipif(rehearsal.compiler() is None, reason="the rehearsal needs a C compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check")
@pytest.mark.parametrize("part", PARTS)
def test_every_step_comes_to_its_end(part: str, tmp_path) -> None:
    """Numbers are garbage; every line that a GPU machine runs has run."""
    checked = [sys.executable, "-m", "tools.rehearsal.checklist", part, "--minutes=30"]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    found = subprocess.run(
        [*checked, f"--out={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    files = kept(tmp_path / f"{part}.tar.gz")
    assert FILES[part] <= files.keys()
    states = {one["step"]: one["state"] for one in json.loads(files["steps.json"])}
    assert states == dict.fromkeys([step.name for step in PARTS[part]], "ok")
    assert files["summary.txt"].strip() in found.stdout
