"""Tutorials: scripts in cells (the percent format), executed as notebooks, and pages of them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from tools.pages.blocks import ROOT

# A picture's text is its cell's: # %% alt="..."
TEMPLATE = """\
{% extends "markdown/index.md.j2" %}
{% block stream %}
```text
{{ output.text }}```
{% endblock %}
{% block data_png %}
![{{ cell.metadata.alt }}]({{ output.metadata.filenames["image/png"] }}){% raw %}{{% endraw -%}
width={{ output.metadata["image/png"].width }}}
{% endblock %}
"""


def execute(script: Path) -> dict[str, str | bytes]:
    """Run a script's cells in a kernel of this checkout, in an empty folder.

    Args:
        script: Jupytext's percent format. A cell that draws says what, for those who do not see it:
            ``# %% alt="..."``.

    Returns:
        Files by name: ``STEM.md``, the page with what each cell printed to stdout and drew;
        ``STEM.ipynb``, the executed notebook; the page's pictures, as PNG.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an error.
    """
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    with TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "IPYTHONDIR": f"{folder}/.ipython",  # nobody's start-up files
        }
        NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--InlineBackend.figure_format=retina", "--log-level=ERROR"],
        ).execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # without progress bars
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    page, resources = exporter.from_notebook_node(notebook, {"unique_key": script.stem})
    return {
        f"{script.stem}.md": page,
        f"{script.stem}.ipynb": nbformat.writes(notebook),
        **resources["outputs"],
    }
