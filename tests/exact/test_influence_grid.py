"""The samples that the picture of influences shows, and their order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra for plots is not installed")

from tangent_ops.errors import ArgumentError
from tangent_ops.exact.influence_grid import influence_grid

QUERY = (torch.rand(3, 8, 8), "a query")


def sample(index: int) -> tuple[torch.Tensor, str]:
    return torch.full((1, 8, 8), float(index)), f"sample {index}"


def test_the_most_helpful_and_the_most_harmful_are_drawn() -> None:
    scores = torch.tensor([0.5, -2.0, 3.0, 0.0, -0.1, 1.0])
    figure = influence_grid(QUERY, sample, scores, top=2)
    captions = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert captions == ["a query", "sample 2\n+3", "sample 5\n+1", "sample 1\n-2", "sample 4\n-0.1"]
    figure.canvas.draw()


def test_a_row_ends_where_the_sign_changes() -> None:
    figure = influence_grid(QUERY, sample, torch.tensor([1.0, 0.0]), top=3)
    captions = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert captions == ["a query", "sample 0\n+1"]


@pytest.mark.parametrize(
    ("scores", "top", "match"),
    [
        (torch.zeros(3, 1), 2, "one input's column"),
        (torch.zeros(0), 2, "scores must be"),
        (torch.zeros(3), 0, "top must be at least 1"),
    ],
)
def test_refusals(scores: torch.Tensor, top: int, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        influence_grid(QUERY, sample, scores, top=top)
