"""A script in cells becomes a notebook, and a page with what its cells print and draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="the extra for the docs is not installed")

from nbclient.exceptions import CellExecutionError

from tools.pages.blocks import ROOT
from tools.pages.notebooks import execute

SCRIPT = """\
# %% [markdown]
# # Title

# %%
import sys
a = 1
print(a + 1)
print("progress", file=sys.stderr)

# %%
import tools
print(tools.__file__)
open("file", "w").close()

# %% alt="A line"
import matplotlib.pyplot as plt

_ = plt.plot([a, 2])
"""


def test_text_code_and_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    files = execute(script)
    page, notebook = files.pop("script.md"), json.loads(files.pop("script.ipynb"))
    [(picture, content)] = files.items()
    lines = [line for line in str(page).splitlines() if line]
    at = lines.index("# Title")
    assert lines[at + 1 : at + 9] == [
        "```python",
        "import sys",
        "a = 1",
        "print(a + 1)",
        'print("progress", file=sys.stderr)',
        "```",
        "```text",
        "2",
    ]
    assert str(ROOT / "tools/__init__.py") in lines  # of this checkout
    assert lines[-1].startswith(f"![A line]({picture}){{width=")
    assert isinstance(content, bytes) and content.startswith(b"\x89PNG")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [[out["output_type"] for out in cell["outputs"]] for cell in cells] == [
        ["stream"],
        ["stream"],
        ["display_data"],
    ]
    assert cells[0]["outputs"][0]["text"] == ["2\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]  # "file" is elsewhere


def test_an_error_names_its_cell(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("# %%\na = 1\n\n# %%\na += 1\nassert a == 1\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match=r"assert a == 1"):
        execute(script)
