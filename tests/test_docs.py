"""The code on pages of docs/ runs, each page's in order, as one program."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_ops.functional._backend import interpreting

DOCS = Path(__file__).parents[1] / "docs"
INSTALLED = importlib.util.find_spec("jvp_flash_attention") is not None


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_precision() -> None:
    (block,) = blocks_of("precision.md")
    names: dict[str, Any] = {}
    exec(block, names)
    assert all(delta.any() for delta in names["tangent"].deltas().values())
    assert names["scaler"].get_scale() == 1024  # no step was skipped


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")  # the rival's
def test_coming_from() -> None:
    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    blocks = blocks_of("coming-from.md")
    assert len(blocks) == 5
    names: dict[str, object] = {}
    tangents = []
    with torch.device(device):
        for block in blocks:
            if "jvp_flash_attention" in block and not (
                INSTALLED and (interpreting() or device == "cuda")
            ):
                continue
            exec(block, names)
            if "y_t" in names:
                tangents.append(names["y_t"])
    assert len(tangents) >= 3
    for tangent in tangents[1:]:
        torch.testing.assert_close(tangent, tangents[0], rtol=1e-4, atol=1e-4)
