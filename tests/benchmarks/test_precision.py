"""Errors of a precision are of the size of its rounding; the table says what is stored."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from benchmarks.precision import PRECISIONS, errors, problem
from benchmarks.precision_table import Errors, precision_table, read_precision
from benchmarks.stored import BadFile

CONTENT = {
    "environment": {"cpu": "A CPU, 2 cores", "torch": "2.14", "commit": "0123", "date": "today"},
    "setting": "a ViT",
    "rows": [asdict(Errors("bfloat16", 1e-3, 2e-3, 3e-3, float("nan"), 5e-3, 6e-3))],
}


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_ours_err_as_pytorch_does(precision) -> None:
    found = errors(problem("test_vit", 1), precision)
    unit = torch.finfo(precision.autocast or precision.anchor).eps / 2
    theirs = (found.plain_value, found.eager_tangent, found.plain_gradient)
    ours = (found.value, found.tangent, found.gradient)
    assert found.plain_value > unit / 10  # it is this precision that was run, and the oracle not
    for one, other in zip(ours, theirs, strict=True):
        if not math.isnan(other):  # torch.func.jvp may overflow in float16
            assert one <= 2 * other + 2 * unit


def test_table() -> None:
    lines = precision_table(CONTENT).splitlines()
    assert lines[2] == "| bfloat16 | 1.0e-03 (2.0e-03) | 3.0e-03 (nan) | 5.0e-03 (6.0e-03) |"
    assert lines[-1] == (
        "a ViT. A CPU, 2 cores, torch 2.14, commit 0123, today; `python -m benchmarks.precision`."
    )


def test_stored_and_not_stored(tmp_path) -> None:
    path = tmp_path / "cpu.json"
    assert precision_table(read_precision(path)) == "Not measured yet."
    path.write_text(json.dumps(CONTENT))
    assert precision_table(read_precision(path)) == precision_table(CONTENT)
    for text in ("no json", "[]", '{"rows": [1]}', '{"rows": []}'):
        path.write_text(text)
        with pytest.raises(BadFile, match=r"cpu\.json is not a file of benchmarks\.precision"):
            read_precision(path)
