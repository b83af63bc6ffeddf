"""``tangent-ops predict``."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tangent_ops.cli.assignment import passed_over
from tangent_ops.cli.chosen import AnchorOnly, How, OneDelta, check_one, chosen
from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import counted, errors, hidden, leaves, tell
from tangent_ops.cli.targets import check_new, unwritten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_STDOUT = Path("-")


def predict(
    run: Run,
    folder: Annotated[
        Path, typer.Argument(help="Folder of images, with or without folders of classes; or one.")
    ],
    csv_file: Annotated[
        Path, typer.Option("--csv", help="Write the table to this file; - for standard output.")
    ],
    scores: Annotated[bool, typer.Option("--scores", help="A column for each class, too.")] = False,
    how: How = None,
    delta: OneDelta = None,
    anchor_only: AnchorOnly = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    config: Config = None,
) -> None:
    """Predict the class of every image in a folder, into a CSV file.

    Columns: path (in FOLDER), prediction, and the predicted class's probability, if the run was
    trained with cross-entropy; otherwise its score, the model's output, which is no probability:
    the rescaled square loss pulls it to 15 for the right class and to 0 for others.
    """
    from tangent_ops.checks import check_integer
    from tangent_ops.evaluate import predict as outputs_of
    from tangent_ops.files import write_atomically
    from tangent_ops.shards import ImageData, Plan

    with errors():
        check_one(how, delta, anchor_only)
        check_integer("batch_size", batch_size, 1)
        if csv_file == _STDOUT:
            leaves("the table was not printed to its end")
        else:
            check_new(csv_file, force, "--csv")
            leaves(unwritten(csv_file))
        plan = Plan.open(run)
        info = plan.anchor_info
        samples = ImageData(str(folder)).unlabelled(info.input)
        tangent, what = chosen(plan, how, delta, anchor_only)
        outputs = outputs_of(tangent, samples, batch_size=batch_size, progress=not hidden(False))
        names = list(info.classes) or [str(index) for index in range(outputs.shape[1])]
        probable = plan.recipe.loss == "cross-entropy" and not anchor_only
        text = _table(samples.ids, outputs.float(), names, probable, scores)
        data = text.encode("utf-8", "surrogateescape")  # names of files may be any bytes
        if csv_file == _STDOUT:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        else:
            write_atomically(csv_file, lambda file: file.writelines([data]))
    if samples.passed_over:
        tell(passed_over(samples))
    if csv_file != _STDOUT:
        count = counted(len(samples), "prediction")
        tell(f"wrote {csv_file}: {count} of the {what.removeprefix('the ')}")


def _table(
    ids: Sequence[str], outputs: Tensor, names: Sequence[str], probable: bool, scores: bool
) -> str:
    """A row for each image, as text in CSV."""
    what = "probability" if probable else "score"
    values = outputs.softmax(dim=1) if probable else outputs
    file = io.StringIO(newline="")
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["path", "prediction", what, *(f"{what}:{n}" for n in names if scores)])
    for sample, row, best in zip(ids, values.tolist(), values.argmax(dim=1).tolist(), strict=True):
        each = [f"{value:.6g}" for value in row] if scores else []
        rows.writerow([sample, names[best], f"{row[best]:.6g}", *each])
    return file.getvalue()
