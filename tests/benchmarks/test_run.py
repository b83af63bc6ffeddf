"""The suite in one command: cut off, it goes on; all groups end in one file."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from benchmarks import run
from benchmarks.record import ROOT, write_json
from benchmarks.stored import read_result
from benchmarks.suite.case import GROUPS, Case
from benchmarks.suite.derivatives import COMPILE_ON_CPU
from benchmarks.suite.models import MODELS
from benchmarks.suite.row import Result, Row


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A suite that writes one row per group; `fails` ends it with 1, `dies` before its JSON."""
    ran: list[str] = []
    fails: set[str] = set()
    dies: set[str] = set()

    def pytest_run(json_file, options, *more):
        group = more[-1] if more else "all"
        ran.append(group)
        if group in dies:
            return 2
        row = Row(Case(group, "op", (1,), "fp32"), "ours", "absent", "a test")
        result = Result(
            {"cpu": "x", "date": "today", "commit": run.commit()}, {"bytes/s": 1.0}, [row]
        )
        write_json(json_file, {"tangent_ops": result.to_json()})
        return int(group in fails)

    monkeypatch.setattr(run, "_pytest", pytest_run)
    return ran, fails, dies


def main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["run", *map(str, arguments)])
    return run.main()


def test_one_process_by_default(suite, monkeypatch, tmp_path) -> None:
    assert main(monkeypatch, "--out", tmp_path) == 0
    assert suite[0] == ["all"] and len(read_result(tmp_path / "suite.json").rows) == 1


def test_it_goes_on_where_it_was_cut_off(suite, monkeypatch, tmp_path) -> None:
    ran, _, dies = suite
    dies.update(GROUPS[3:])
    assert main(monkeypatch, "--out", tmp_path, "--resume") != 0
    assert len(read_result(tmp_path / "suite.json").rows) == 3  # of what there is
    dies.clear()
    ran.clear()
    assert main(monkeypatch, "--out", tmp_path, "--resume") == 0
    assert ran == list(GROUPS[3:])
    rows = read_result(tmp_path / "suite.json").rows
    assert [row.case.group for row in rows] == list(GROUPS)


def test_parts_of_another_commit_are_measured_anew(suite, monkeypatch, tmp_path) -> None:
    """Merged, they would pass for this commit's."""
    main(monkeypatch, "--out", tmp_path, "--resume")
    suite[0].clear()
    monkeypatch.setattr(run, "commit", lambda: "another")
    main(monkeypatch, "--out", tmp_path, "--resume")
    assert suite[0] == list(GROUPS)


def test_a_red_group_is_kept_and_the_end_is_red(suite, monkeypatch, tmp_path) -> None:
    suite[1].add(GROUPS[0])
    assert main(monkeypatch, "--out", tmp_path, "--resume") == 1
    assert len(read_result(tmp_path / "suite.json").rows) == len(GROUPS)


def test_a_killed_process_is_red(monkeypatch, tmp_path, capsys) -> None:
    """Its status is negative: the largest of all parts would not be it."""
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9))
    assert main(monkeypatch, "--out", tmp_path, "--resume") == 137
    assert "killed by signal 9; by 9 often for want of memory" in capsys.readouterr().err


def test_compiled_models_go_into_a_file_apart(suite, monkeypatch, tmp_path) -> None:
    ran, _, dies = suite
    monkeypatch.setenv(COMPILE_ON_CPU, "0")  # and put back afterwards
    patterns = [f"{name} and {run.WITH_COMPILED_FORM}" for name in MODELS]
    dies.add(patterns[2])
    assert main(monkeypatch, "--out", tmp_path, "--compiled") == 2
    assert ran == patterns and os.environ[COMPILE_ON_CPU] == "1"
    assert len(read_result(tmp_path / "compiled.json").rows) == 2
    assert not (tmp_path / "suite.json").exists()
    dies.clear()
    assert main(monkeypatch, "--out", tmp_path, "--compiled") == 0
    assert ran[3:] == patterns[2:] and len(read_result(tmp_path / "compiled.json").rows) == 3


def test_compiled_models_that_do_not_run(suite, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv(COMPILE_ON_CPU, "0")
    suite[2].update(f"{name} and {run.WITH_COMPILED_FORM}" for name in MODELS)
    assert main(monkeypatch, "--out", tmp_path, "--compiled") == 2
    assert capsys.readouterr().err == "nothing was measured\n"


def test_what_has_a_compiled_form_is_selected(monkeypatch) -> None:
    """By pytest itself: providers of the largest model that `-k` leaves."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_suite.py", "--collect-only", "-q"]
    command += ["--extent=full", "-k", f"large and {run.WITH_COMPILED_FORM}"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"train-step-vit_large_patch16_224-\d+-fp32-([\w-]+)\]", listed)
    forms = ("taft-all", "taft-1", "finetune")
    assert sorted(found) == sorted([*forms, *(f"{form}-compiled" for form in forms)])


def test_out_that_is_a_file(suite, monkeypatch, tmp_path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(monkeypatch, "--out", file) == 2
    assert "is a file: name a folder" in capsys.readouterr().err and suite[0] == []
