"""`page_of`: a run's report as one HTML page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from tangent_ops.files import write_atomically
from tangent_ops.pages import rendered
from tangent_ops.report.charts import DotPlot, dot_plot, plot
from tangent_ops.report.run_report import SHOWN, RunReport
from tangent_ops.report.scores import LEFT_OUT
from tangent_ops.shards.scoring import Estimate

TABLED = 20  # classes of a confusion matrix; with more, only the most frequent confusions are shown
COLUMNS = 24  # classes of the table of classes by shard
CURVES = 40  # lines in a plot
NAMED = 8  # of which so few have a colour each
EVENTS = 100
EXTREMES = 10  # shards that help most, and least, where there are many
_CONFUSIONS = 8
_METHODS = {
    "exact": "each shard fitted to its optimum",
    "gradient": "each shard trained by steps",
    "statistics": "one pass over each shard, solved together",
}


@dataclass(frozen=True)
class Cell:
    """A number in a table, and its share of its row."""

    count: int
    share: float


@dataclass(frozen=True)
class Heat:
    """A table of counts with shares of its rows."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Confusion:
    """How many images of one class were taken for another."""

    target: str
    predicted: str
    count: int
    total: int


def page_of(report: RunReport) -> str:
    """The page: one HTML file without scripts, that loads nothing.

    All names, of shards, classes and files, are escaped.

    Raises:
        UnsupportedError: jinja2 is not installed.
    """
    plan, scores = report.plan, report.scores
    histories = {s.name: s.history for s in report.shards if s.history is not None}
    removed = plan.manifest.removed()
    private = plan.recipe.dp_epsilon is not None
    return rendered(
        Path(__file__).parent / "run.html.j2",
        report=report,
        plan=plan,
        info=plan.anchor_info,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        method=_METHODS[plan.recipe.method] + (", with differential privacy" if private else ""),
        images=sum(len(shard.samples) for shard in report.shards),
        trained=sum(shard.done for shard in report.shards),
        forgotten=sum(one.samples for one in removed),
        score=None if scores is None else percent(scores.models.accuracy(scores.main)),
        accuracy=_accuracy(report),
        without=_without(report),
        most_left_out=LEFT_OUT,
        extremes=EXTREMES,
        confusion=_confusion(report),
        confusions=_confusions(report),
        shards=report.shards[:SHOWN],
        changes=_changes(report),
        by_shard=_by_shard(report),
        losses=plot({n: h.loss for n, h in list(histories.items())[:CURVES]}, short),
        accuracies=plot({n: h.accuracy for n, h in list(histories.items())[:CURVES]}, _percents),
        curves=CURVES,
        named=NAMED,
        bounds={n: h.bound for n, h in histories.items() if h.bound is not None},
        certified=[shard for shard in report.shards if shard.certificate is not None],
        events=report.events[:EVENTS],
        short=short,
        points=points,
    )


def write_page(report: RunReport, path: Path) -> int:
    """Write the page, completely or not at all.

    Returns:
        Its size in bytes.

    Raises:
        UnsupportedError: jinja2 is not installed.
        OSError: the file cannot be written.
    """
    page = page_of(report).encode("utf-8", "replace")  # names of files may be no text

    def write(file: BinaryIO) -> None:
        file.write(page)

    write_atomically(path, write)
    return len(page)


def short(value: float) -> str:
    """A number with three digits."""
    return f"{value:.3g}"


def percent(estimate: Estimate) -> str:
    """A share with its standard error."""
    return f"{100 * estimate.value:.1f} ± {100 * estimate.error:.1f} %"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its standard error."""
    return f"{100 * estimate.value:+.1f} ± {100 * estimate.error:.1f} points".replace("-", "−")


def _percents(value: float) -> str:
    return f"{round(100 * value, 1):g} %"


def _signed(value: float) -> str:
    return f"{round(100 * value, 1):+g}".replace("-", "−") if value else "0"


def _accuracy(report: RunReport) -> DotPlot | None:
    if report.scores is None:
        return None
    models = report.scores.models
    found = {name: models.accuracy(name) for name in models.classes}
    return dot_plot(found, _percents, percent, limits=(0, 1))


def _changes(report: RunReport) -> dict[str, Estimate]:
    """Shard -> accuracy without it, less that with it."""
    scores = report.scores
    if scores is None or scores.without is None:
        return {}
    joint = scores.joint
    return {name: joint.gain(name, "") for name in scores.without.classes}


def _without(report: RunReport) -> DotPlot | None:
    changes = _changes(report)
    if not changes:
        return None
    ordered = sorted(changes.items(), key=lambda item: item[1].value)
    if len(ordered) > 2 * EXTREMES:
        ordered = ordered[:EXTREMES] + ordered[-EXTREMES:]
    return dot_plot({"": Estimate(0, 0), **dict(ordered)}, _signed, points)


def _confusion(report: RunReport) -> Heat | None:
    """The confusion matrix of the main model, for few classes; those without images are absent."""
    if report.scores is None:
        return None
    matrix = report.scores.models.confusion(report.scores.main)
    there = ((matrix.sum(0) + matrix.sum(1)) > 0).nonzero()[:, 0].tolist()
    if len(there) > TABLED:
        return None
    rows = matrix[there][:, there].tolist()
    names = [report.classes[index] for index in there]
    return Heat(names, [(n, _cells(row)) for n, row in zip(names, rows, strict=True)])


def _confusions(report: RunReport) -> list[Confusion]:
    """The most frequent confusions of the main model."""
    if report.scores is None:
        return []
    matrix = report.scores.models.confusion(report.scores.main)
    totals = matrix.sum(1).tolist()
    off = matrix - matrix.diag().diag()
    pairs = sorted(off.nonzero().tolist(), key=lambda pair: -int(off[pair[0], pair[1]]))
    return [
        Confusion(
            report.classes[target], report.classes[other], int(off[target, other]), totals[target]
        )
        for target, other in pairs[:_CONFUSIONS]
    ]


def _by_shard(report: RunReport) -> Heat:
    """Images by shard and class; the most frequent classes, and the first shards."""
    totals: Counter[int] = Counter()
    for shard in report.shards:
        totals.update(shard.classes)
    columns = sorted(index for index, _ in totals.most_common(COLUMNS))
    return Heat(
        [report.classes[index] for index in columns],
        [
            (shard.name, _cells([shard.classes.get(i, 0) for i in columns], len(shard.samples)))
            for shard in report.shards[:SHOWN]
        ],
    )


def _cells(row: list[int], total: int | None = None) -> list[Cell]:
    whole = sum(row) if total is None else total
    return [Cell(count, count / whole if whole else 0.0) for count in row]
