"""Compile every kernel for every supported GPU; attention with its tiles of `configs.json`.

    python -m tools.kernels.compile_kernels [--arch 90] [--jobs 2] [--out FILE]

No GPU is needed. Exit status 1: a kernel spills more registers than `known_spills.py` admits, a
block takes more shared or tensor memory than the GPU has, an admitted spill does not happen, or a
16-bit kernel for heads of up to 128 has no wgmma on sm_90, or a serialized one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import triton
from rich.console import Console
from tangent_kernels.attention.configs import DIMS, DIRECTIONS, table
from tqdm import tqdm

from tools.kernels.known_spills import (
    KNOWN_EXCESS,
    KNOWN_SERIALIZED,
    KNOWN_SPILLS,
    OTHER_TRITON,
    TRITON,
)
from tools.kernels.report import record, table_of, write
from tools.kernels.resources import SHARED_LIMITS, Resources, resources
from tools.kernels.row_samples import WIDTHS, launches
from tools.kernels.samples import Case, launch_of, variants_of

PADDED = (8, 72, 80, 96)  # head dimensions that no tile fits exactly, on sm_90


def main() -> int:
    options = _parse()
    console = Console(width=None if sys.stdout.isatty() else 220)
    cases = default_cases(options.arch)
    others = row_cases(options.arch)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        attention = tqdm(pool.imap(measure, cases), "attention", len(cases))
        found = dict(zip(cases, attention, strict=True))
        rows = list(tqdm(pool.imap(row_problems, others), "rows", len(others)))
    records = [record(case, one) for case, one in found.items()]
    console.print(table_of(records))
    if options.out:
        write(options.out, records)
    problems = [problem for case in cases for problem in problems_of(case, found[case])]
    problems += [*stale_admissions(found), *itertools.chain(*rows)]
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    count = len(cases) + sum(len(launches(*case[1:])) for case in others)
    console.print(f"{count} kernels by Triton {triton.__version__}: {len(problems)} problems")
    return int(bool(problems))


def default_cases(archs: Iterable[int] = tuple(SHARED_LIMITS)) -> list[Case]:
    """Every attention kernel with its default tiles; float16 compiles as bfloat16 does."""
    cases = []
    for arch in archs:
        for direction in DIRECTIONS:
            case = functools.partial(Case, direction, arch)
            cases += [case(torch.bfloat16, dim) for dim in DIMS]
            if arch == 90:
                cases += [case(torch.bfloat16, dim) for dim in PADDED]
            variants = variants_of(case(torch.bfloat16, 64).key)
            cases += [case(torch.bfloat16, 64, variant) for variant in variants]
            cases += [case(torch.float32, dim) for dim in DIMS]
    return [case for case in cases if case.key in table()]


def row_cases(archs: Iterable[int]) -> list[tuple[int, int, torch.dtype]]:
    """Architecture, width of rows and dtype for every run of :func:`row_problems`."""
    dtypes = (torch.bfloat16, torch.float32)
    return [(arch, width, dtype) for arch in archs for width in WIDTHS for dtype in dtypes]


def row_problems(case: tuple[int, int, torch.dtype]) -> list[str]:
    """Problems of the norm, activation, softmax and linear kernels; none is admitted."""
    arch, width, dtype = case
    problems = []
    for name, launch in launches(width, dtype).items():
        found = resources(launch, arch)
        where = f"{name}, sm_{arch}, {str(dtype).removeprefix('torch.')}, rows of {width}"
        if found.spilled:
            problems.append(f"{where}: spills {found.spilled} bytes")
        if found.excess(arch):
            problems.append(f"{where}: {found.excess(arch)}")
        if found.serialized and dtype.itemsize == 2:
            problems.append(f"{where}: {found.serialized}")
    return problems


def measure(case: Case) -> Resources:
    """Compile the case's kernel."""
    return resources(launch_of(case), case.arch)


def problems_of(case: Case, found: Resources) -> list[str]:
    """Problems that fail the check."""
    problems = []
    admitted = admitted_spill(case)
    if found.spilled > admitted:
        problems.append(f"{case.name}: spills {found.spilled} bytes, admitted are {admitted}")
    excess = found.excess(case.arch)
    if excess and case.arch not in KNOWN_EXCESS.get(_kind(case), ()):
        problems.append(f"{case.name}: {excess}")
    if found.matrix == 0:
        problems.append(f"{case.name}: compiled to no matrix instruction")
    if _has_wgmma(case):
        if found.serialized and case.dim not in KNOWN_SERIALIZED.get(case.direction, ()):
            problems.append(f"{case.name}: {found.serialized}")
        if found.matrix and not found.hgmma:
            problems.append(f"{case.name}: compiled without wgmma")
    return problems


def _has_wgmma(case: Case) -> bool:
    """Whether the kernel should use sm_90's own matrix instructions, one after another."""
    return case.arch == 90 and case.key.bits == 16 and case.key.dim <= 128


def admitted_spill(case: Case) -> int:
    """Bytes that the case may spill, by the head dimension that its tiles are for."""
    known = KNOWN_SPILLS.get(_kind(case), {}).get(case.arch, 0)
    return known if triton.__version__.startswith(TRITON) else known + OTHER_TRITON


def _kind(case: Case) -> tuple[str, int, int]:
    return case.direction, case.key.bits, case.key.dim


def stale_admissions(found: dict[Case, Resources]) -> list[str]:
    """What is admitted of these cases and does not happen, with Triton TRITON."""
    if not triton.__version__.startswith(TRITON):
        return []
    spilled: dict[tuple[str, int, int, int], int] = {}
    for case, one in found.items():
        kind = (*_kind(case), case.arch)
        spilled[kind] = max(spilled.get(kind, 0), one.spilled)
    return [
        f"known_spills.py: {direction}, sm_{arch}, {bits} bit, {dim} does not spill"
        for (direction, bits, dim), by_arch in KNOWN_SPILLS.items()
        for arch in by_arch
        if spilled.get((direction, bits, dim, arch), 1) == 0
    ] + [
        f"known_spills.py: {case.name} fits into shared memory"
        for case, one in found.items()
        if case.arch in KNOWN_EXCESS.get(_kind(case), ()) and case.variant == "plain"
        if not one.excess(case.arch)
    ]


def _parse() -> argparse.Namespace:
    archs = tuple(SHARED_LIMITS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, help="JSON file for all that is known of each kernel")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
