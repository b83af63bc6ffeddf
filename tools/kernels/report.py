"""Compiled attention kernels as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import triton
from rich.table import Table

from tools.kernels.loop_costs import costs_of
from tools.kernels.resources import Resources
from tools.kernels.samples import Case

TAKEN = ("regs", "stack", "KiB", "TMEM", "blocks", "HMMA", "HGMMA", "UTCMMA", "serial")
# Of one iteration of the main loop, on sm_90: see loop_costs.Loop.
COSTS = ("work", "tensor", "issue", "MUFU", "ALU", "shared", "bytes", "per 1000")


def record(case: Case, found: Resources) -> dict[str, Any]:
    """What is known of a case's compiled kernel."""
    costs = costs_of(case, found)
    return {
        "kernel": case.direction,
        "arch": case.arch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "dim": case.dim,
        "variant": case.variant,
        "tiles": list(astuple(found.config)),
        "registers": found.registers,
        "stack": found.spilled,
        "shared": found.shared,
        "tensor": found.tensor,
        "blocks": found.blocks(case.arch),
        "hmma": found.hmma,
        "hgmma": found.hgmma,
        "utcmma": found.utcmma,
        "serialized": found.serialized,
        "loop": asdict(costs) | {"per_1000": costs.per_1000} if costs else None,
    }


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSON."""
    content = {"triton": triton.__version__, "kernels": list(records)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table_of(records: Iterable[dict[str, Any]]) -> Table:
    """What each kernel takes, and what an iteration of its main loop costs, in clocks and bytes."""
    found = Table(title=f"Attention kernels, compiled by Triton {triton.__version__}")
    for name in ("kernel", "tiles"):
        found.add_column(name, no_wrap=True)
    for name in (*TAKEN, *COSTS):
        found.add_column(name, justify="right")
    for one in records:
        names = ("registers", "stack", "shared", "tensor", "blocks", "hmma", "hgmma", "utcmma")
        cells = [str(one[name]) for name in names]
        cells[2] = f"{one['shared'] / 1024:.1f}"
        cells.append("yes" if one["serialized"] else "")
        if loop := one["loop"]:
            costs = (loop[name] for name in ("tensor", "issue", "mufu", "alu", "shared", "loaded"))
            cells += [f"{loop['work']:.3g}", *(f"{cost:.0f}" for cost in costs)]
            cells.append(f"{loop['per_1000']:.0f}")
        found.add_row(_name(one), " ".join(map(str, one["tiles"])), *cells)
    return found


def kinds_table(records: Iterable[dict[str, Any]]) -> Table:
    """The instructions of an iteration by kind; "rescaling" are part of fp32's."""
    loops = {_name(one): one["loop"] for one in records if one["loop"]}
    kinds = {kind: None for loop in loops.values() for kind in loop["kinds"]}
    found = Table(title="Instructions of one iteration of the main loop, in each warp")
    found.add_column("kernel")
    for name in ("all", *kinds, "rescaling"):
        found.add_column(name, justify="right")
    for name, loop in loops.items():
        counts = (loop["instructions"], *loop["kinds"].values(), loop["rescaling"])
        found.add_row(name, *map(str, counts))
    return found


def _name(one: dict[str, Any]) -> str:
    return f"{one['kernel']}, sm_{one['arch']}, {one['dtype']}, {one['dim']}, {one['variant']}"
