"""The page's part on forgetting: accuracy as shards are removed, and what a request costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.paper.cells import Found
from studies.paper.outcomes import right
from studies.paper.parts import forgetting
from studies.paper.parts.forgetting import AGAIN, ENSEMBLE, EXACT, MEANS, ORDINARY, SUMS
from studies.paper.report.claims import FAILS, Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, gain
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    SUMS: Look("sum of statistics", "v", "-", pictures.EXACT),
    MEANS: Look("mean of TAFTs (ledger)", "D", "-", pictures.TANGENT),
    ENSEMBLE: Look("NLFT ensemble (SISA)", "o", ":", pictures.ORDINARY_OTHER),
    EXACT: Look("TAFT, exact, again", "P", "--", pictures.EXACT),
    AGAIN: Look("TAFT again", "^", "-", pictures.TANGENT_OTHER),
    ORDINARY: Look("NLFT again", "s", "--", pictures.ORDINARY),
}
# Way -> what it does on a request, and what it needs of the images that stay.
REQUESTS = {
    SUMS: ("subtract the images' statistics, solve", "none"),
    MEANS: ("train the shards they are in again", "those of these shards"),
    ENSEMBLE: ("train the shards they are in again", "those of these shards"),
    EXACT: ("move to the optimum of the rest, certify", "all, as factors"),
    ORDINARY: ("train on all again", "all"),
}


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = sorted(found.of(forgetting.PART), key=lambda cell: cell["seed"])
    ways: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        for name, way in cell["ways"].items():
            ways.setdefault(name, []).append(way)
    anchor = np.stack([right(cell["anchor"]) for cell in cells if "anchor" in cell])
    curve = Curve(cells[0], ways, anchor)
    figures = [
        (curve.draw(out / "forgetting.png"), "Accuracy as shards are removed"),
        (curve.draw_costs(out / "requests.png"), "What a request costs, and the accuracy after it"),
    ]
    text = "\n\n".join([curve.table(), curve.costs()])
    return Section("Forgetting", curve.findings(), text, figures, curve.claims())


class Curve:
    """What all cells found.

    Args:
        first: A cell, for its sizes.
        ways: Way -> what a cell has of it, for each seed.
        anchor: Which test images the anchor is right on, (S, I).
    """

    def __init__(
        self, first: dict[str, Any], ways: dict[str, list[dict[str, Any]]], anchor: np.ndarray
    ) -> None:
        self.first, self.ways, self.anchor = first, ways, anchor
        self.removed: list[int] = first["removed"]
        self.requests: list[int] = first["requests"]

    def at(self, way: str, index: int) -> np.ndarray:
        """Right or not at a point of the curve, (S, I)."""
        return np.stack([right(seed["removed"][index]) for seed in self.ways[way]])

    def after(self, way: str, index: int) -> np.ndarray:
        """Right or not after a request, (S, I)."""
        return np.stack([right(seed["requests"][index]["outcome"]) for seed in self.ways[way]])

    def seconds(self, way: str, index: int) -> list[float]:
        """Of a request, for each seed."""
        return [seed["requests"][index]["seconds"] for seed in self.ways[way]]

    def findings(self) -> list[str]:
        """What was aimed at first."""
        last, most = self._late(), len(self.requests) - 1
        mean, sums = (
            gain(self.at(one, 0), self.at(other, 0))
            for one, other in ((MEANS, AGAIN), (SUMS, EXACT))
        )
        lost = [Claim("", lead, "not lower").verdict == FAILS for lead in (mean, sums)]
        fast = {way: Mean.of(self.seconds(way, most)).value for way in REQUESTS}
        after = {way: self._mean(self.after(way, most)) for way in REQUESTS}
        times = [
            f"{LOOKS[way].title} {fast[way]:.2g} s ({after[way]} %)"
            for way in sorted(fast, key=fast.__getitem__)
        ]
        late = [
            f"{LOOKS[way].title} {self._mean(self.at(way, last))}"
            for way in (SUMS, MEANS, ENSEMBLE, EXACT, ORDINARY)
        ]
        return [
            f"{'Missed' if any(lost) else 'Reached'}: what can be forgotten should cost no "
            f"accuracy while it is there. The mean of TAFTs less TAFT of all images: "
            f"{mean.points()}; the sum of statistics less the exact TAFT of all: {sums.points()}.",
            f"{self.removed[last]} of {self.first['shards']} shards of {self.first['images']} "
            f"removed, test accuracy, %: {', '.join(late)}.",
            f"A request of {self.requests[most]} images at random, with the accuracy after it: "
            f"{', '.join(times)}.",
        ]

    def table(self) -> str:
        """A row to each point of the curve."""
        first = self.first
        rows = ["| removed | " + " | ".join(look.title for look in LOOKS.values()) + " |"]
        rows.append("| --- " * (1 + len(LOOKS)) + "|")
        for index, removed in enumerate(self.removed):
            shown = [self._mean(self.at(way, index)) for way in LOOKS]
            rows.append(f"| {removed} of {first['shards']} | " + " | ".join(shown) + " |")
        return (
            f"{first['images']}: {first['train']} private images in {first['shards']} shards, "
            f"dealt at random; {first['public']} public ones for the anchor's classifier, which "
            f"alone is right on {self._mean(self.anchor)} %, and for the statistics' core. Test "
            "accuracy, %, after shards were removed one after the other. Rates were chosen once to "
            "a seed, with all images, and kept for what is trained again; l2 of the statistics by "
            f"generalised cross-validation, anew each time. {first['epochs']} passes.\n\n"
            + "\n".join(rows)
        )

    def costs(self) -> str:
        """Seconds, accuracy and what is kept, a row to each way."""
        asked = [f"{n} image{'s' * (n > 1)}: seconds | %" for n in self.requests]
        head = ["way", "on a request", *asked, "kept, MB", "needs of the other images"]
        rows = ["| " + " | ".join(head) + " |"]
        rows.append("| --- " * (len(head) + len(asked)) + "|")
        for way, (done, needed) in REQUESTS.items():
            shown = [
                f"{Mean.of(self.seconds(way, index)).value:.2g} | "
                + self._mean(self.after(way, index))
                for index in range(len(self.requests))
            ]
            kept = Mean.of([seed["bytes"] for seed in self.ways[way]]).value / 1e6
            cells = [LOOKS[way].title, done, *shown, f"{kept:.0f}", needed]
            rows.append("| " + " | ".join(cells) + " |")
        bounds = [one["requests"][-1]["bound"] / one["norm"] for one in self.ways[EXACT]]
        return (
            "What a request of images costs that are spread at random over all shards, and the "
            "test accuracy after it. Seconds are of one processor; frozen blocks ran before. A "
            "shard's TAFT was timed once, by passes through the model, and counts for every shard "
            "that an image is taken from. Kept is what a way needs beside the images: sums, "
            "deltas, models, or layer factors. After each request the statistics were, bit for "
            "bit, those of images that were never asked for, computed from these alone. The exact "
            f"fit is within {max(bounds):.1e} of the optimum's norm by its certificates.\n\n"
            + "\n".join(rows)
        )

    def claims(self) -> list[Claim]:
        """What a reader would ask for."""
        last, most = self._late(), len(self.requests) - 1
        none, late = "no shard removed", f"{self.removed[last]} of {self.first['shards']} removed"
        pairs = [
            (0, none, MEANS, AGAIN, "not lower"),
            (0, none, MEANS, ENSEMBLE, "not lower"),
            (0, none, SUMS, MEANS, "higher"),
            (0, none, SUMS, EXACT, "not lower"),
            (0, none, SUMS, ORDINARY, "not lower"),
            (last, late, MEANS, ENSEMBLE, "not lower"),
        ]
        words = {"higher": "more accurate than", "not lower": "not less accurate than"}
        claims = [
            Claim(
                f"{when}: {LOOKS[one].title} is {words[wanted]} {LOOKS[other].title}",
                gain(self.at(one, index), self.at(other, index)),
                wanted,  # type: ignore[arg-type]
            )
            for index, when, one, other, wanted in pairs
        ]
        for index in (0, most):
            for other in (ENSEMBLE, ORDINARY):
                ratios = np.log10(self.seconds(other, index)) - np.log10(self.seconds(SUMS, index))
                count = self.requests[index]
                claims.append(
                    Claim(
                        f"a request of {count}: the sum of statistics takes less time than "
                        f"{LOOKS[other].title} (powers of ten)",
                        Mean.of(ratios.tolist()),
                        "higher",
                        percent=False,
                    )
                )
        return claims

    @pictures.styled()
    def draw(self, path: Path) -> Path:
        """Accuracy against the part that is removed."""
        figure = pictures.new_figure(height=4.6)
        axes = figure.subplots()
        removed = [100 * count / self.first["shards"] for count in self.removed]
        ends = []
        for way, look in LOOKS.items():
            means = [Mean.crossed(self.at(way, index)) for index in range(len(removed))]
            ends.append((draw_series(axes, look, removed, means), look.title, look.colour))
        anchor = 100 * float(self.anchor.mean())
        pictures.draw_level(axes, anchor)
        ends.append((anchor, "the anchor", pictures.LEVEL))
        axes.set_xticks(removed)
        axes.set_xlabel(f"removed of {self.first['shards']} shards, %")
        axes.set_ylabel("test accuracy, %")
        errors = "Bars: standard errors over seeds and test images."
        pictures.note(figure, f"{pictures.TERMS} {errors}")
        pictures.label_ends(axes, ends)
        return pictures.save(figure, path)

    @pictures.styled()
    def draw_costs(self, path: Path) -> Path:
        """Accuracy after a request against its seconds, a panel to each request."""
        figure = pictures.new_figure(height=3.8)
        panels = figure.subplots(1, len(self.requests), sharey=True, squeeze=False)[0]
        asked = range(len(self.requests))
        every = np.log10([Mean.of(self.seconds(way, i)).value for way in REQUESTS for i in asked])
        ends = int(np.floor(every.min())), int(np.ceil(every.max()))
        decades = [10.0**power for power in range(ends[0], ends[1] + 1)]
        for index, axes in enumerate(panels):
            for way in REQUESTS:
                mean, look = Mean.crossed(self.after(way, index)), LOOKS[way]
                seconds = Mean.of(self.seconds(way, index)).value
                draw_series(axes, look, [seconds], [mean])
            count = self.requests[index]
            axes.set_title(f"{count} image{'s' * (count > 1)}")
            pictures.number_axis(axes, decades)
            axes.set_xlabel("seconds")
        panels[0].set_ylabel("test accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        pictures.legend_above(figure, 3, dict(zip(labels, handles, strict=True)))
        pictures.note(figure, f"{pictures.TERMS} Bars: standard errors over seeds and test images.")
        return pictures.save(figure, path)

    def _late(self) -> int:
        """The last point but one: at the last one, a single shard may be left."""
        return max(0, len(self.removed) - 2)

    def _mean(self, values: np.ndarray) -> str:
        return Mean.crossed(values).percent()
