"""Models in processes of their own, with limits, and the file that holds their rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from tools.coverage.measure import FAILED, Row, first_line, measure
from tools.coverage.members import Member
from tools.machine import about

SECONDS = 400
BYTES = 10 << 30


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by `Member.key`; none if there is no file.

    Raises:
        ValueError: the file does not hold rows of this sweep.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [Row.from_json(json.loads(line)) for line in lines]
        return {Member(**row.member).key: row for row in rows}
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path} is not a result of the coverage sweep: {problem}") from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows, one a line, and replace the file at the end."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def sweep(members: Iterable[Member], path: Path) -> dict[str, Row]:
    """Measure each member and write the file after each; rows of other members stay."""
    rows, where = read_rows(path), about()
    bar = tqdm(list(members), unit="model")
    for member in bar:
        bar.set_postfix_str(member.model)
        row = in_a_process(member)
        row.about = where
        rows[member.key] = row
        write_rows(path, rows.values())
        bar.write(f"{member.key}: {row.verdict} {row.reason}")
    return rows


def in_a_process(member: Member, seconds: int = SECONDS, limit: int = BYTES) -> Row:
    """The member's row, also where its process is killed or takes too long."""
    # Forked from a server that has imported everything: a new interpreter takes 6 s for that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.coverage.measure", "timm"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(member, theirs, seconds, limit), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return Row.from_json(ours.recv())
        reason = f"takes more than {seconds} s"
    except EOFError:
        process.join()
        reason = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Row(member.to_json(), FAILED, reason)


def _work(member: Member, pipe: Connection, seconds: int, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # The process ends by itself where its parent was killed.
    resource.setrlimit(resource.RLIMIT_CPU, (2 * seconds, 2 * seconds))
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        row = measure(member)
    except Exception as problem:
        row = Row(member.to_json(), FAILED, first_line(problem))
    pipe.send(row.to_json())
