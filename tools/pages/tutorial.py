"""Runs a script in cells (the percent format), and gives the page of its text, code and outputs."""

from __future__ import annotations

import io
import re
from contextlib import chdir, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def execute(script: Path) -> tuple[str, dict[str, bytes]]:
    """Run the cells in order, as one program, in an empty folder.

    Args:
        script: Cells begin with ``# %%``, and cells of Markdown with ``# %% [markdown]``.

    Returns:
        The page in Markdown, with what each cell printed and drew below it; and the pictures by
        name, as PNG.

    Raises:
        ValueError: Something comes before the first cell.
        Exception: What a cell raises.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = script.read_text(encoding="utf-8")
    before, *cells = CELL.split(text)
    if before.strip():
        raise ValueError(f"{script}: line 1 is not '# %%', the start of a cell")
    names: dict[str, Any] = {"__name__": "__main__"}
    page: list[str] = []
    pictures: dict[str, bytes] = {}
    line = before.count("\n")
    with TemporaryDirectory() as folder:
        for kind, body in zip(cells[::2], cells[1::2], strict=True):
            if kind.strip() == "[markdown]":
                page += [re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE), ""]
            else:
                page += ["```python", body.strip("\n"), "```", ""]
                printed = io.StringIO()
                with redirect_stdout(printed), chdir(folder):
                    exec(compile("\n" * line + body, str(script), "exec"), names)
                if printed.getvalue():
                    page += ["```text", printed.getvalue().rstrip("\n"), "```", ""]
                for number in pyplot.get_fignums():
                    file = io.BytesIO()
                    figure = pyplot.figure(number)
                    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
                    title = figure.get_suptitle() or "Picture"
                    pyplot.close(figure)
                    name = f"{script.stem}-{len(pictures) + 1}.png"
                    pictures[name] = file.getvalue()
                    page += [f"![{title}]({name})", ""]
            line += body.count("\n")
    return "\n".join(page), pictures
