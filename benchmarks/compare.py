"""Whether a commit is slower than an earlier one, beyond noise, on cases of the suite.

    python -m benchmarks.compare --base main
    python -m benchmarks.compare --base v0.1 --cases 'linear|elementwise' --out DIR

Both commits are checked out beside the repository and the head's tests run. Then one process per
commit answers the same cases of this checkout's `benchmarks`, in turns.

A process has one memory layout, and a constant few per cent with it: a change counts once a second
pair of processes has found it, too.

Exit status: 0 no slowdown; 1 a slowdown, or at head an answer that is wrong or none; 2 they cannot
be compared; 3 tests are red at head.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from benchmarks.compare_worker import RequestFailed, Worker, WorkerDied, started_worker
from benchmarks.console import wide_console
from benchmarks.head_tests import NoTests, RedTests, check_tests, run_tests
from benchmarks.processes import stop_by_exception
from benchmarks.record import ROOT, write_json
from benchmarks.verdict import CONFIDENCE, Verdict, judge
from benchmarks.worktrees import GitError, changed_files, check_repository, commit_of, worktrees

NO_SLOWDOWN, SLOWDOWN, UNUSABLE, RED = range(4)
# A few quick ones: a patch-16 ViT's attention, its MLP's first layer, and a whole model.
CASES = {
    "cpu": r"^attention-(for|back)ward attention 8x12x197x64 fp32$"
    r"|^linear linear 1576x384x1536 fp32$|^model-forward vit_small_patch16_224 8 fp32$",
    "cuda": r"^attention-(for|back)ward attention 64x12x197x64 bf16$"
    r"|^linear linear 12608x768x3072 bf16$|^model-forward vit_small_patch16_224 64 bf16$",
}
TESTS = ("tests/ops", "tests/test_linearize.py", "tests/test_forward_ad.py")
OURS = ("ours", "taft-all", "taft-1")
FEWEST_ROUNDS = 5  # fewer have no interval to speak of
LISTED = 8  # names that an error lists

Listing = Mapping[str, Sequence[str]]  # a case's group and name, to its providers' names


class UsageError(Exception):
    """What was asked for cannot be done; the message names argument, value and way out."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: group and name.
        provider: who answered, of both commits.
        word: a verdict's; or head's answer was "wrong", "failed" (it raised) or "absent" (not on
            this machine); or "new": base has no right answer.
        note: why there are no numbers, or "".
        verdict: the numbers.
        base: seconds of each round's call.
        head: likewise.
    """

    case: str
    provider: str
    word: str
    note: str = ""
    verdict: Verdict | None = None
    base: Sequence[float] = ()
    head: Sequence[float] = ()

    @property
    def bad(self) -> bool:
        return self.word in ("slower", "wrong", "failed")

    @property
    def changed(self) -> bool:
        return self.word in ("slower", "faster")


def main(
    argv: Sequence[str] | None = None,
    *,
    repository: Path = ROOT,
    benchmarks: Path = ROOT / "benchmarks",
) -> int:
    """The command, on any repository and with the `benchmarks` package of any folder."""
    try:
        outcomes = compare(_parse(argv), repository, benchmarks)
    except RedTests as red:
        print(f"compare: {red}", file=sys.stderr)
        return RED
    except (UsageError, NoTests, GitError, WorkerDied) as problem:
        print(f"compare: {problem}", file=sys.stderr)
        return UNUSABLE
    return SLOWDOWN if any(outcome.bad for outcome in outcomes) else NO_SLOWDOWN


def compare(args: argparse.Namespace, repository: Path, benchmarks: Path) -> list[Outcome]:
    """Checks, measures, prints and writes: an outcome for every chosen case and provider.

    Raises:
        UsageError: an argument makes no sense here.
        GitError: there is no such commit, or no repository.
        NoTests: --tests holds none.
        RedTests: the head's tests fail; nothing was timed.
        WorkerDied: a worker ended.
    """
    _check(args)
    check_repository(repository)
    base = commit_of(repository, "--base", args.base)
    head = commit_of(repository, "--head", args.head)
    if base == head:
        raise UsageError(
            f"--base {args.base} and --head {args.head} are both commit {base[:12]}: there is "
            "nothing to compare. Commit the change, or name an earlier --base"
        )
    if changed := changed_files(repository, but="benchmarks"):
        print(f"Uncommitted changes are not measured: {_some(changed)}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_copy_of(benchmarks))
        trees = stack.enter_context(worktrees(repository, [base, head]))
        check_tests(trees[1], args.tests)
        after = stack.enter_context(
            started_worker(f"head {head[:12]}", trees[1], folder, args.device)
        )
        try:
            listing, about = _load(after, trees[1])
        except RequestFailed as problem:
            raise UsageError(f"--head {args.head} cannot load the suite: {problem}") from None
        chosen = choose(listing, args.cases, args.providers)

        print(f"Tests of head {head[:12]}: {' '.join(args.tests)}", flush=True)
        run_tests(trees[1], head, args.tests)

        before = stack.enter_context(
            started_worker(f"base {base[:12]}", trees[0], folder, args.device)
        )
        try:
            known, unknown = _load(before, trees[0])[0], "base does not list it"
        except RequestFailed as problem:  # the suite imports what is not there yet
            known, unknown = {}, f"base cannot load the suite: {problem}"
        outcomes = []
        for case, provider in tqdm(chosen, desc="cases"):
            why_new = "" if provider in known.get(case, ()) else unknown
            outcomes.append(measure(case, provider, before, after, why_new, args))
        if any(outcome.changed for outcome in outcomes):
            # In the same order, so that again the base is the one that was started last.
            pair = [
                stack.enter_context(started_worker(f"{name}, again", tree, folder, args.device))
                for name, tree in ((after.name, trees[1]), (before.name, trees[0]))
            ]
            for worker, tree in zip(pair, (trees[1], trees[0]), strict=True):
                _load(worker, tree)
            outcomes = [
                confirm(outcome, pair[1], pair[0], args) if outcome.changed else outcome
                for outcome in tqdm(outcomes, desc="changes again")
            ]

    about |= {"base": f"{base} ({args.base})", "head": f"{head} ({args.head})"}
    _show(outcomes, about, args.tolerance)
    if args.out is not None:
        numbers = {"rounds": args.rounds, "tolerance": args.tolerance, "tests": args.tests}
        entries = [asdict(outcome) for outcome in outcomes]
        file = args.out / "compare.json"
        write_json(file, {"environment": about, **numbers, "outcomes": entries})
        print(f"every sample in {file}")
    return outcomes


def choose(listing: Listing, pattern: str, names: Sequence[str] | None) -> list[tuple[str, str]]:
    """The cases that the pattern is found in, with the named providers that each has.

    Without names they are ours, by any of their names, or else the case's first.

    Raises:
        UsageError: that leaves nothing.
    """
    cases = [case for case in listing if re.search(pattern, case)]
    if not cases:
        raise UsageError(
            f"--cases '{pattern}' is found in no case. Here there are: {_some(list(listing))}"
        )
    chosen = []
    for case in cases:
        found = [name for name in listing[case] if name in (names or OURS)]
        if not found and names is None:
            found = listing[case][:1]
        chosen += [(case, name) for name in found]
    if not chosen:
        there = list(dict.fromkeys(name for case in cases for name in listing[case]))
        raise UsageError(
            f"--providers {' '.join(names or ())}: no chosen case has one of them. "
            f"Here there are: {_some(there)}"
        )
    return chosen


def measure(
    case: str, provider: str, before: Worker, after: Worker, why_new: str, args: argparse.Namespace
) -> Outcome:
    """Checks the case at head, then at base unless it is known to be new, then times both."""
    try:
        found = after.ask("prepare", case, provider)
    except RequestFailed as problem:
        return Outcome(case, provider, "failed", f"head: {problem}")
    if found["status"] != "ok":
        return Outcome(case, provider, found["status"], f"head: {found['note']}")
    if why_new:
        return Outcome(case, provider, "new", why_new)
    try:
        found = before.ask("prepare", case, provider)
    except RequestFailed as problem:
        return Outcome(case, provider, "new", f"base: {problem}")
    if found["status"] != "ok":
        return Outcome(case, provider, "new", f"base is {found['status']}: {found['note']}")

    seconds: dict[Worker, list[float]] = {before: [], after: []}
    for turn in range(args.rounds):
        # ABBA: whoever comes second finds another machine, so both do in turns.
        for worker in (before, after) if turn % 2 == 0 else (after, before):
            try:
                taken = worker.ask("time")["seconds"]
            except RequestFailed as problem:
                word = "failed" if worker is after else "new"
                return Outcome(case, provider, word, f"{worker.name}, timed: {problem}")
            seconds[worker].append(taken)
    verdict = judge(seconds[before], seconds[after], args.tolerance)
    return Outcome(
        case, provider, verdict.word, "", verdict, tuple(seconds[before]), tuple(seconds[after])
    )


def confirm(first: Outcome, before: Worker, after: Worker, args: argparse.Namespace) -> Outcome:
    """The outcome itself if another pair of processes finds the same, else what that pair finds."""
    again = measure(first.case, first.provider, before, after, "", args)
    if again.word == first.word:
        return first
    assert first.verdict is not None
    ratio = f"{first.verdict.ratio:.3f}"
    return replace(
        again, note=f"first {first.word}, {ratio}; these are another pair's. {again.note}"
    )


def _load(worker: Worker, worktree: Path) -> tuple[Listing, dict[str, str]]:
    """The worker's cases and environment.

    Raises:
        RequestFailed: the suite cannot be imported there.
        UsageError: a package would come from elsewhere than the commit.
    """
    found = worker.ask("cases")
    for package, origin in found["packages"].items():
        if origin is None or not Path(origin).resolve().is_relative_to(worktree.resolve()):
            raise UsageError(
                f"{worker.name} has no package {package} of its own (found: {origin}): "
                "that commit cannot be measured"
            )
    about = {name: value for name, value in found["environment"].items() if name != "commit"}
    return found["cases"], about


def _show(outcomes: Sequence[Outcome], about: Mapping[str, str], tolerance: float) -> None:
    title = f"Head against base: slower or faster beyond {tolerance:.1%}"
    table = Table(title=title, title_justify="left")
    for heading in ("case", "provider"):
        table.add_column(heading)
    for heading in ("base, ms", "head, ms", "ratio", f"{CONFIDENCE:.0%} interval"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for outcome in outcomes:
        numbers = [""] * 4
        if (verdict := outcome.verdict) is not None:
            medians = map(statistics.median, (outcome.base, outcome.head))
            interval = f"{verdict.lower:.3f} to {verdict.upper:.3f}"
            numbers = [*(f"{x * 1e3:.3f}" for x in medians), f"{verdict.ratio:.3f}", interval]
        table.add_row(outcome.case, outcome.provider, *numbers, outcome.word)
    wide_console().print(table)
    for outcome in outcomes:
        if outcome.note:
            print(f"{outcome.word}: {outcome.case}, {outcome.provider}: {outcome.note}")
    if note := hidden(outcomes, tolerance):
        print(note)
    for name, value in about.items():
        print(f"{name:>8}  {value}")
    counts = Counter(outcome.word for outcome in outcomes)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))


def hidden(outcomes: Sequence[Outcome], tolerance: float) -> str:
    """A line on the slowdown that could hide in the noise of what is the same, or ""."""
    same = [o.verdict.upper for o in outcomes if o.verdict and o.word == "same within noise"]
    most = max(same, default=0.0)
    if most <= 1 + tolerance:
        return ""
    return (
        f"Noise could hide a slowdown of up to {most - 1:.1%}: "
        "a quieter machine or more --rounds shows smaller ones"
    )


@contextlib.contextmanager
def _copy_of(benchmarks: Path) -> Iterator[Path]:
    """A folder with a copy of the package: both workers have the same, whatever is edited."""
    with tempfile.TemporaryDirectory(prefix="tangent-ops-benchmarks-") as folder:
        unneeded = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(benchmarks, Path(folder) / "benchmarks", ignore=unneeded)
        yield Path(folder)


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no repository to be refused."""
    if args.rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"--rounds {args.rounds}: fewer than {FEWEST_ROUNDS} tell nothing from noise"
        )
    if not args.tolerance >= 0:
        raise UsageError(f"--tolerance {args.tolerance}: a fraction from 0 on; 0.03 is 3 %")
    try:
        re.compile(args.cases)
    except re.error as problem:
        raise UsageError(
            f"--cases '{args.cases}' is no regular expression: {problem}; \\ escapes a character"
        ) from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; name --device cpu")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: that is a file; name a folder")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0]
    )
    add: Any = parser.add_argument
    add("--base", required=True, metavar="REF", help="the commit to compare with")
    add("--head", default="HEAD", metavar="REF", help="the commit in question (default: HEAD)")
    add("--cases", metavar="PATTERN", help="regular expression (default: a few quick cases)")
    add(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="who answers (default: ours, or a case's first)",
    )
    add("--rounds", type=int, default=10, help="timed calls of each commit (default: 10)")
    add("--tolerance", type=float, default=0.03, help="change that is none (default: 0.03)")
    add("--tests", nargs="+", default=list(TESTS), metavar="PATH", help="what must pass at head")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add("--out", type=Path, metavar="DIR", help="folder for every sample, as JSON")
    args = parser.parse_args(argv)
    if args.cases is None:
        args.cases = CASES[args.device]
    return args


if __name__ == "__main__":
    stop_by_exception()
    sys.exit(main())
