"""The page's part on privacy: accuracy against ε."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.paper.cells import Found
from studies.paper.parts import privacy
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, paired
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    "tangent": Look("TAFT-1", "D", "-", pictures.TANGENT),
    "ordinary": Look("NLFT-1 (Opacus)", "s", "--", pictures.ORDINARY),
    "probe": Look("linear probe", "o", ":", pictures.PROBE),
}


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = found.of(privacy.PART)
    epsilons = sorted({cell["epsilon"] for cell in cells if "epsilon" in cell})
    scores = {(way, epsilon): _chosen(found, way, epsilon) for way in LOOKS for epsilon in epsilons}
    open_ = [cell for cell in cells if cell["way"] == "not private"]
    free = Mean.of([cell["test_accuracy"] for cell in open_])
    anchor = Mean.of([cell["anchor_accuracy"] for cell in open_])
    rows = ["| way | " + " | ".join(f"ε = {epsilon:g}" for epsilon in epsilons) + " |"]
    rows.append("| --- " * (1 + len(epsilons)) + "|")
    for way, look in LOOKS.items():
        shown = [Mean.of(scores[way, epsilon][0]).percent() for epsilon in epsilons]
        rows.append(f"| {look.title} | " + " | ".join(shown) + " |")
    first = next(cell for cell in cells if "epsilon" in cell)
    text = (
        f"{first['images']}: {first['private']} private images, {first['public']} public ones for "
        f"the anchor's classifier, which alone is right on {anchor.percent()} %; TAFT-1 without "
        f"privacy on {free.percent()} %. TAFT-1 and NLFT-1 take {first['steps']} steps of "
        f"{first['expected']} images on average, the probe {privacy.PROBE_STEPS} of half of them "
        "all. Rates were chosen for each ε and way on "
        f"{first['validation']} public images. Test accuracy, %.\n\n" + "\n".join(rows)
    )
    claims = []
    for epsilon in epsilons:
        tangent = scores["tangent", epsilon][0]
        claims.append(
            Claim(
                f"ε = {epsilon:g}: TAFT-1 is more accurate than NLFT-1",
                paired(tangent, scores["ordinary", epsilon][0]),
                "higher",
                "Noise is added to as many numbers in either; convexity does not lower it, and "
                "over so few steps an ordinary model is nearly linear.",
            )
        )
        claims.append(
            Claim(
                f"ε = {epsilon:g}: TAFT-1 is more accurate than a private probe",
                paired(tangent, scores["probe", epsilon][0]),
                "higher",
                "The probe has a few thousand numbers to add noise to, not millions.",
            )
        )
    series = {look: [Mean.of(scores[way, e][0]) for e in epsilons] for way, look in LOOKS.items()}
    levels = {"TAFT-1, not private": free, "public probe: no private image": anchor}
    path = draw(epsilons, series, levels, cells[0]["failure"], out / "privacy.png")
    return Section("Privacy", text, [(path, "Accuracy against ε")], claims)


def _chosen(found: Found, way: str, epsilon: float) -> tuple[list[float], float]:
    """Accuracy of every seed at the rate that was chosen, and that rate."""
    best = privacy.chosen(found, way=way, epsilon=epsilon)
    assert best is not None
    given: dict[str, Any] = {"way": way, "epsilon": epsilon, "rate": best["rate"]}
    cells = sorted(found.of(privacy.PART, **given), key=lambda cell: cell["seed"])
    return [cell["test_accuracy"] for cell in cells], best["rate"]


@pictures.styled()
def draw(
    epsilons: Sequence[float],
    series: Mapping[Look, Sequence[Mean]],
    levels: Mapping[str, Mean],
    failure: float,
    path: Path,
) -> Path:
    """Accuracies against ε.

    Args:
        epsilons: Of the points.
        series: The accuracies of a way, one for each ε.
        levels: Accuracies without ε: the first without privacy, the second without private images.
        failure: δ.
        path: Of the PNG.
    """
    figure = pictures.new_figure(height=4.2)
    axes = figure.subplots()
    ends = [
        (draw_series(axes, look, epsilons, means), look.title, look.colour)
        for look, means in series.items()
    ]
    for (words, mean), line in zip(levels.items(), ("-.", (0, (1, 2))), strict=True):
        pictures.draw_level(axes, 100 * mean.value, line=line)
        ends.append((100 * mean.value, words, pictures.LEVEL))
    pictures.number_axis(axes, epsilons)
    axes.set_xlabel(f"ε at δ = {failure:g}")
    axes.set_ylabel("test accuracy, %")
    pictures.note(figure, f"{pictures.TERMS} Bars: standard errors over seeds.")
    pictures.label_ends(axes, ends)
    return pictures.save(figure, path)
