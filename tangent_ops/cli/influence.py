"""``tangent-ops influence``."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, hidden, leaves, need, say
from tangent_ops.cli.targets import check_new, unwritten

if TYPE_CHECKING:
    from torch import Tensor

    from tangent_ops.shards import Plan
    from tangent_ops.shards.run_influence import Influences

_LONGEST = 16  # characters of a caption's line: as wide as a picture


def influence(
    run: Run,
    image: Annotated[Path, typer.Argument(help="An image's file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The picture's file. Default: influence-NAME.png in this folder."),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="The image's class. Default: the folder it is in, if that is a class; else the "
            "predicted class.",
        ),
    ] = None,
    how: Annotated[
        Literal["mean", "lossless", "statistics"] | None,
        typer.Option(help="The composition. Default: the mean, or statistics in such a run."),
    ] = None,
    top: Annotated[int, typer.Option(help="Images that helped most, and that harmed most.")] = 6,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the picture.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Draw the training images that helped and harmed a run's prediction for one image most.

    The numbers are the change of the image's loss if that training image were forgotten; they are
    exact, without training. For runs of --method exact, or statistics. Copies of that image under
    other names stay, which `forget` would take out, too. Forgotten images are not shown: they have
    no influence.
    """
    need("plots", "matplotlib")

    import torch

    from tangent_ops.checks import check_integer
    from tangent_ops.errors import ArgumentError
    from tangent_ops.files import write_atomically
    from tangent_ops.shards import ImageData, Plan
    from tangent_ops.shards.composing import default_how
    from tangent_ops.shards.run_influence import check, influences

    path = out or Path(f"influence-{image.stem}.png")
    with errors():
        check_integer("top", top, 1)
        check_new(path, force, "--out")
        leaves(unwritten(path))
        if image.is_dir():
            raise ArgumentError(f"{image} is a folder: give the file of one image")
        plan = Plan.open(run)
        check(plan, how or default_how(plan))
        names = list(plan.anchor_info.classes)
        target = _target(image, class_name, names)
        query = ImageData(str(image)).unlabelled(plan.anchor_info.input)[0][0]
        wanted = None if target is None else torch.tensor([target])
        found = influences(plan, query[None], wanted, how, progress=not hidden(as_json))
        changes = found.changes[:, 0]
        predicted = _named(names, int(found.logits.argmax()))
        truth = predicted if target is None else _named(names, target)
        words = [image.name, truth, *(["predicted", predicted] if truth != predicted else [])]
        png = _picture(plan, found, (query, "\n".join(map(_short, words))), top)
        write_atomically(path, lambda file: file.writelines([png]))
    order = changes.argsort(descending=True).tolist()
    helpful = [_row(found, names, one) for one in order[:top] if changes[one] > 0]
    harmful = [_row(found, names, one) for one in order[::-1][:top] if changes[one] < 0]
    if as_json:
        record = {"image": str(image), "class": truth, "predicted": predicted}
        record |= {"picture": str(path), "helpful": helpful, "harmful": harmful}
        typer.echo(json.dumps(record, indent=2))
        return
    known = "" if target is not None else ", taken as its class (--class gives another)"
    say(f"{image}: predicted {predicted}{known}")
    table = Table("effect", "change of its loss", "image", "class", "shards")
    for effect, rows in (("helped", helpful), ("harmed", harmful)):
        for row in rows:
            shards = ", ".join(row["shards"])
            cells = (row["sample"], row["class"], shards)
            table.add_row(effect, f"{row['change']:+.2g}", *map(escape, cells))
    Console().print(table)
    say(f"wrote {path}")


def _target(image: Path, class_name: str | None, names: list[str]) -> int | None:
    from tangent_ops.checks import did_you_mean
    from tangent_ops.errors import ArgumentError

    if class_name is not None:
        if class_name not in names:
            raise ArgumentError(
                f"--class {class_name}: the run has no such class{did_you_mean(class_name, names)}"
            )
        return names.index(class_name)
    folder = image.absolute().parent.name
    return names.index(folder) if folder in names else None


def _named(names: list[str], index: int) -> str:
    return names[index] if names else str(index)


def _row(found: Influences, names: list[str], index: int) -> dict[str, Any]:
    sample = found.samples[index]
    return {
        "sample": sample.id,
        "class": _named(names, sample.target),
        "shards": list(found.shards[index]),
        "change": float(found.changes[index, 0]),
    }


def _picture(plan: Plan, found: Influences, query: tuple[Tensor, str], top: int) -> bytes:
    """The grid, as a PNG."""
    import torch

    from tangent_ops.exact.influence_grid import influence_grid

    info, samples = plan.anchor_info, found.samples
    data = plan.data.pick(
        [s.id for s in samples], [s.target for s in samples], [s.content for s in samples],
        info.input,
    )  # fmt: skip
    mean, spread = (torch.tensor(info.input[key])[:, None, None] for key in ("mean", "std"))

    def sample(index: int) -> tuple[Tensor, str]:
        named = _named(list(info.classes), samples[index].target)
        name = PurePosixPath(samples[index].id).name
        return data[index][0] * spread + mean, f"{_short(name)}\n{_short(named)}"

    image, caption = query
    figure = influence_grid((image * spread + mean, caption), sample, found.changes[:, 0], top)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _short(text: str) -> str:
    """One line for a caption, cut where it is long; no formulas, which matplotlib would set."""
    text = text if text.isprintable() else repr(text)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    return text.replace("$", r"\$")
