"""A script in cells becomes a page with what its cells print and draw."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra for plots is not installed")

from tools.pages.tutorial import execute

SCRIPT = """\
# %% [markdown]
# # Title
#
# Text.

# %%
a = 1
print(a)

# %%
import matplotlib.pyplot as plt

figure, axis = plt.subplots()
figure.suptitle("A line")
axis.plot([a, 2])
open("file", "w").close()
"""

PAGE = """\
# Title

Text.

```python
a = 1
print(a)
```

```text
1
```

```python
import matplotlib.pyplot as plt

figure, axis = plt.subplots()
figure.suptitle("A line")
axis.plot([a, 2])
open("file", "w").close()
```

![A line](script-1.png)
"""


def written(folder: Path, text: str) -> Path:
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    return script


def test_text_code_and_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, pictures = execute(written(tmp_path, SCRIPT))
    assert page == PAGE
    assert list(pictures) == ["script-1.png"]
    assert pictures["script-1.png"].startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]  # "file" is elsewhere


def test_an_error_names_the_line_of_the_script(tmp_path: Path) -> None:
    script = written(tmp_path, "# %%\na = 1\n\n# %%\na += 1\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        execute(script)
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(script), 6)


def test_text_before_the_first_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1 is not '# %%'"):
        execute(written(tmp_path, "a = 1\n# %%\n"))
