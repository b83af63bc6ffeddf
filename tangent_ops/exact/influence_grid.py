"""Draws an input, and the training samples that helped and harmed its prediction most."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from tangent_ops.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def influence_grid(
    query: tuple[Tensor, str],
    sample: Callable[[int], tuple[Tensor, str]],
    scores: Tensor,
    top: int = 6,
) -> Figure:
    """Draw an input, and the samples whose removal increases or decreases its loss most.

    Args:
        query: the input's image, (3, height, width) or (1, height, width), in any range of values,
            and a caption.
        sample: index -> image and caption of a training sample.
        scores: (N,): the change of the input's loss when each sample is left out, a column of
            `Influence.loss_change` or `first_order_scores`.
        top: samples in a row; only samples with a score of the row's sign are drawn.

    Returns:
        A matplotlib figure (extra ``plots``).

    Raises:
        ArgumentError: scores is not (N,), or top is below 1.
    """
    from matplotlib.figure import Figure

    if scores.ndim != 1 or len(scores) == 0:
        raise ArgumentError(f"scores must be (N,), got {tuple(scores.shape)}: one input's column")
    if top < 1:
        raise ArgumentError(f"top must be at least 1, got {top}")
    order = scores.argsort(descending=True).tolist()
    helpful = [index for index in order[:top] if scores[index] > 0]
    harmful = [index for index in order[::-1][:top] if scores[index] < 0]
    figure = Figure(figsize=(1.25 * (top + 1.4), 4.3), layout="constrained")
    grid = figure.add_gridspec(2, top + 1, width_ratios=[1.4] + [1.0] * top)
    _draw(figure.add_subplot(grid[:, 0]), *query)
    rows = ((helpful, "Without these its loss rises"), (harmful, "Without these its loss falls"))
    for row, (indices, title) in enumerate(rows):
        for column in range(top):
            axes = figure.add_subplot(grid[row, column + 1])
            if column == 0:
                axes.set_title(title, loc="left", fontsize=10)
            if column >= len(indices):
                axes.set_axis_off()
                continue
            image, caption = sample(indices[column])
            _draw(axes, image, f"{caption}\n{float(scores[indices[column]]):+.2g}")
    return figure


def _draw(axes, image: Tensor, caption: str) -> None:
    image = image.detach().float().cpu()
    image = image - image.min()
    image = (image / image.max().clamp_min(1e-6)).permute(1, 2, 0)
    axes.imshow(image.numpy(), cmap="gray")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=9)
