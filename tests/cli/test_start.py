"""What a command line does before its command runs imports no torch, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

RUN = """
import contextlib, io, json, os, sys
from tangent_ops.cli import main

def outcome(line, **environment):
    sys.argv = ["tangent-ops", *line.split()]
    os.environ.update(environment)
    out, code = io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    [os.environ.pop(name) for name in environment]
    slow = sorted({"torch", "timm", "numpy", "PIL"} & set(sys.modules))
    found.append([line, code, out.getvalue(), slow])

found = []
outcome("--help")
outcome("--version")
from tangent_ops.cli.app import app
from typer.main import get_command
commands = get_command(app).commands
lines = [f"{n} {s}" for n, c in commands.items() for s in getattr(c, "commands", {"": c})]
for line in lines:
    outcome(f"{line} --help")
outcome("finetun")
outcome("finetune --no-such-option")
outcome("finetune")
outcome("finetune photos --out run --epochs many")
outcome("finetune photos --out run --epochs 0")
outcome("finetune photos --out run --method exact --l2 0")
for shell in ("bash", "zsh"):
    words = dict(COMP_WORDS="tangent-ops fi", COMP_CWORD="1")
    outcome("", _TANGENT_OPS_COMPLETE=f"complete_{shell}", **words,
            _TYPER_COMPLETE_ARGS="tangent-ops fi")
print(json.dumps(found))
"""


def test_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    helps = [said for line, code, said, _ in found if line.endswith("--help") and code == 0]
    assert len(helps) > 12
    assert all("Usage:" in said for said in helps)
    ends = {line: (code, said) for line, code, said, _ in found if not line.endswith("--help")}
    assert ends["--version"][0] == 0
    for line, word in {
        "finetun": "No such command",
        "finetune --no-such-option": "No such option",
        "finetune": "Missing",
        "finetune photos --out run --epochs many": "--epochs",
        "finetune photos --out run --epochs 0": "epochs must be an integer of at least 1",
        "finetune photos --out run --method exact --l2 0": "method 'exact' needs l2 > 0",
    }.items():
        assert ends[line][0] == 2
        assert word in ends[line][1], ends[line][1]
    assert "finetune" in ends[""][1]
    assert [(line, slow) for line, _, _, slow in found if slow] == []
