"""Progress bars name what is computed, and are silent on demand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense import Dense
from small_models import images

from tangent_ops.exact import (
    Problem,
    certify,
    compose_lossless,
    first_order_scores,
    fit_exact,
    leave_one_out,
    predictive_covariance,
    progress,
)

L2 = 0.05
INPUTS = images(1, seed=9).double()
CALLS: dict[str, tuple[Callable[[Problem], object], list[str]]] = {
    "fit": (lambda p: fit_exact(p, tol=0.1, rank=2), ["exact fit", "gradient", "product"]),
    "certificate": (lambda p: certify(p), ["certificate"]),
    "uncertainty": (
        lambda p: predictive_covariance(p, INPUTS, tol=0.5, rank=2),
        ["uncertainty", "solve", "gradient", "product"],
    ),
    "leave one out": (
        lambda p: leave_one_out(p, [0], INPUTS, tol=0.5, rank=2),
        ["leave one out", "solve", "product"],
    ),
    "scores": (
        lambda p: first_order_scores(p, INPUTS, torch.tensor([1]), tol=0.5, rank=2),
        ["first-order scores", "solve", "product"],
    ),
    "composition": (
        lambda p: compose_lossless([p.tangent.delta_dict()], [p.curvature()], 0.5),
        ["lossless composition"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_labels(
    dense: Dense, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    dense.set(torch.zeros_like(dense.delta) if name == "fit" else dense.optimum(L2))
    call, labels = CALLS[name]
    call(dense.problem(L2, progress=True))
    shown = capsys.readouterr().err
    for label in labels:
        assert f"{label}:" in shown
    named = {line.split(":")[0].strip() for line in shown.split("\r") if "it/s" in line}
    assert not any(not part or part[0].isdigit() for part in named)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "composition"])
def test_silence(
    dense: Dense, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    dense.set(dense.optimum(L2))
    CALLS[name][0](dense.problem(L2))
    assert capsys.readouterr().err == ""
