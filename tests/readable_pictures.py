"""`assert_readable`: what can be seen to be wrong with a figure, measured through its renderer."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

TOUCH = 1.0  # pixel by which boxes may overlap: they have some air around the ink


def assert_readable(figure: Figure) -> None:
    """Texts do not overlap, are whole and not struck through; legends have no box; lines show.

    Panels side by side that show the same thing have the same scale. A text with a plate of its own
    hides what is behind it, so no line goes through it.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = _texts(figure)
    boxes = {text: text.get_window_extent(canvas.get_renderer()) for text in texts}
    whole = figure.bbox
    clipped = [
        text.get_text()
        for text, box in boxes.items()
        if box.x0 < -TOUCH
        or box.y0 < -TOUCH
        or box.x1 > whole.x1 + TOUCH
        or box.y1 > whole.y1 + TOUCH
    ]
    assert not clipped, f"cut off at the picture's edge: {clipped}"
    pairs = [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in combinations(boxes.items(), 2)
        if _overlap(a, b)
    ]
    assert not pairs, f"texts overlap: {pairs}"
    struck = [
        text.get_text()
        for axes in figure.axes
        for line in axes.lines
        for text, box in boxes.items()
        if text.get_bbox_patch() is None and _crosses(line, box, axes)
    ]
    assert not struck, f"a line goes through a text: {struck}"
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    boxed = [legend for legend in legends if legend is not None and legend.get_frame_on()]
    assert not boxed, f"legends with a box: {boxed}"
    hidden = [axes.get_title(loc="left") for axes in figure.axes if _hides_a_level(axes)]
    assert not hidden, f"a level line lies on an axis or outside: {hidden}"
    _assert_same_scales(figure)


def _texts(figure: Figure) -> list[Text]:
    """Those that are drawn and not empty; ticks outside the limits are not drawn."""
    found: list[Text] = []
    for axes in figure.axes:
        for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
            low, high = sorted((low, high))
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                off = not low <= tick.get_loc() <= high
                found += [label for label in (tick.label1, tick.label2) if off]
    unseen = set(found)
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text)
        and text not in unseen
        and text.get_text().strip()
        and _shown(text)
    ]


def _shown(artist: Any) -> bool:
    axes = artist.axes
    off = axes is not None and not axes.axison and "tick" in type(artist).__name__.lower()
    return artist.get_visible() and not off


def _overlap(one: Bbox, other: Bbox) -> bool:
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return wide > TOUCH and high > TOUCH


def _crosses(line: Line2D, box: Bbox, axes: Axes) -> bool:
    """Whether a drawn line, within its axes, goes through a box."""
    if line.get_linestyle() in ("None", "none", "") or not line.get_visible():
        return False
    inside = Bbox.intersection(box.padded(-TOUCH), axes.bbox)
    path = line.get_transform().transform_path(line.get_path())
    return inside is not None and bool(path.intersects_bbox(inside, filled=False))


def _hides_a_level(axes: Axes) -> bool:
    """Whether a line from left to right is not at least 1 % of the height inside."""
    for line in axes.lines:
        y = np.asarray(line.get_ydata(), dtype=float)
        if len(y) < 2 or np.ptp(y):
            continue
        place = axes.transLimits.transform(axes.transScale.transform((axes.get_xlim()[0], y[0])))
        if not 0.01 <= place[1] <= 0.99:
            return True
    return False


def _assert_same_scales(figure: Figure) -> None:
    """Panels side by side with the same label; or with no label and no ticks of their own."""
    words = " ".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))
    if "scales differ" in words:
        return
    rows: dict[int, list[Axes]] = {}
    for axes in figure.axes:
        if (place := axes.get_subplotspec()) is not None:
            rows.setdefault(place.rowspan.start, []).append(axes)
    for panels in rows.values():
        for one, other in combinations(panels, 2):
            ticks = any(label.get_visible() for label in other.get_yticklabels())
            if other.get_ylabel() == (one.get_ylabel() if ticks else "") and other.axison:
                assert one.get_ylim() == other.get_ylim(), "panels side by side differ in scale"
