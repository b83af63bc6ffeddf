"""The page's part on influence: what taking out harmful images does."""

from __future__ import annotations

from pathlib import Path

from studies.paper.cells import Found
from studies.paper.methods import LOW_RANK
from studies.paper.parts import influence
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, paired
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    "exact": Look("exact influence", "D", "-", pictures.EXACT),
    "classical": Look("classical influence", "^", "--", pictures.RIVAL),
    "random": Look("at random", "o", ":", pictures.LEVEL),
}
PANELS = {"validation_loss": "validation loss", "test_loss": "test loss"}


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = sorted(found.of(influence.PART), key=lambda cell: cell["seed"])
    removed = [point["removed"] for point in cells[0]["points"]]

    def series(index: int, name: str, key: str) -> list[float]:
        return _series(cells, index, name, key)

    rows = ["| removed | by | validation loss | test loss | test accuracy, % | wrong labels |"]
    rows.append("| --- " * 6 + "|")
    for index, count in enumerate(removed):
        for name, look in LOOKS.items():
            if count == 0 and name != "exact":
                continue
            losses = [Mean.of(series(index, name, key)) for key in PANELS]
            shown = " | ".join(f"{loss.value:.2f} ± {loss.error:.2f}" for loss in losses)
            right = Mean.of(series(index, name, "test_accuracy")).percent()
            wrong = Mean.of(series(index, name, "wrong_found")).value
            title = look.title if count else "–"
            rows.append(f"| {count} | {title} | {shown} | {right} | {wrong:.1f} |")
    path = _draw(cells, removed, out / "influence.png")
    first = cells[0]
    agreement = Mean.of([cell["correlation"] for cell in cells])
    ratio = Mean.of([cell["exact_over_classical"] for cell in cells])
    seconds = Mean.of([cell["influence_seconds"] for cell in cells])
    text = (
        f"{first['images']}: {first['train']} training images, {first['wrong']} of them with a "
        f"wrong class; rank-{LOW_RANK} deltas, fitted exactly. Scores of all images by both in "
        f"{seconds.value:.0f} s; they correlate by {agreement.value:.3f}, and the exact one is "
        f"{ratio.value:.2f} times the classical one in the median. Images are ranked by the loss "
        "of the validation images and taken out, and the model is fitted again.\n\n"
        + "\n".join(rows)
    )
    last = len(removed) - 1
    count = removed[last]
    claims = [
        Claim(
            f"{count} images removed: {key.partition('_')[0]} loss is lower by exact influence "
            f"than {other}",
            paired(series(last, name, key), series(last, "exact", key)),
            "higher",
            why,
            percent=False,
        )
        for key in PANELS
        for name, other, why in (
            ("random", "at random", "The images that harm validation need not harm the test."),
            (
                "classical",
                "by classical influence",
                "With this much regularisation no image has much leverage on its own output, so "
                "the factor that the classical influence leaves out is near 1 and the ranks are "
                "nearly the same.",
            ),
        )
    ]
    return Section("Influence", text, [(path, "Images removed by influence")], claims)


def _series(cells: list[dict], index: int, name: str, key: str) -> list[float]:
    return [cell["points"][index][name][key] for cell in cells]


@pictures.styled()
def _draw(cells: list[dict], removed: list[int], path: Path) -> Path:
    figure = pictures.new_figure(height=4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for each, (key, title) in zip(panels, PANELS.items(), strict=True):
        before = _series(cells, 0, "exact", key)
        for number, (name, look) in enumerate(LOOKS.items()):
            changes = [
                paired(_series(cells, index, name, key), before) for index in range(1, len(removed))
            ]
            apart = [count + 0.4 * (number - 1) for count in removed[1:]]  # two of them coincide
            draw_series(each, look, apart, changes, factor=1)
        each.axhline(0, color=pictures.LEVEL, linewidth=1)
        each.set_xticks(removed[1:])
        each.set_xlabel("training images removed")
        each.set_title(title)
    panels[0].set_ylabel("change of the loss")
    pictures.legend_above(figure, columns=3)
    pictures.note(figure, "Bars: standard errors over seeds. Points are set apart sideways.")
    return pictures.save(figure, path)
