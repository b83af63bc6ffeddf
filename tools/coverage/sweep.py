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

from benchmarks.record import environment
from benchmarks.stored import BadFile
from tools.coverage.measure import FAILED, Row, measure
from tools.coverage.members import Member

SECONDS = 400
BYTES = 10 << 30
ABOUT = ("cpu", "torch", "timm", "commit", "date")


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by their key; none if there is no file.

    Raises:
        BadFile: it is not of this sweep.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [Row.from_json(json.loads(line)) for line in lines]
        return {Member(**row.member).key: row for row in rows}
    except (KeyError, TypeError, ValueError) as problem:
        raise BadFile(f"{path} is not a result of the coverage sweep: {problem}") from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows, one a line; whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def sweep(members: Iterable[Member], path: Path) -> dict[str, Row]:
    """Measures each and keeps the file up to date; rows of others stay."""
    rows = read_rows(path)
    about = {name: value for name, value in environment().items() if name in ABOUT}
    bar = tqdm(list(members), unit="model")
    for member in bar:
        bar.set_postfix_str(member.model)
        row = in_a_process(member)
        row.about = about
        rows[member.key] = row
        write_rows(path, rows.values())
        bar.write(f"{member.key}: {row.verdict} {row.reason}")
    return rows


def in_a_process(member: Member, seconds: int = SECONDS, limit: int = BYTES) -> Row:
    """Its row, whatever becomes of the process."""
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
    return Row(_as_json(member), FAILED, reason)


def _work(member: Member, pipe: Connection, seconds: int, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * seconds, 2 * seconds))  # if nobody is left to kill
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        row = measure(member)
    except Exception as problem:
        row = Row(_as_json(member), FAILED, f"{type(problem).__name__}: {problem}".splitlines()[0])
    pipe.send(row.to_json())


def _as_json(member: Member) -> dict:
    return {**vars(member), "options": dict(member.options)}
