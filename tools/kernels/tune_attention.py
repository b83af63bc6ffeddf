"""Choose the tiles of the attention kernels and write `tangent_kernels/attention/configs.json`.

    python -m tools.kernels.tune_attention --screen     # compile only; no GPU is needed
    python -m tools.kernels.tune_attention --out DIR    # on a GPU: also time; minutes on 16 cores

Each kernel's candidates are compiled for each architecture. Those that spill registers or take more
shared memory than a block has are dropped, and `configs.cost` ranks the others. With a GPU the
first few, and the present tiles, are also timed, on the shapes below, for that GPU's architecture.
The table is written after every kernel, so a run that is cut keeps what it has; timings.json,
beside it, has the times.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from tangent_kernels._launch import Config, Launch
from tangent_kernels.attention import configs
from tangent_kernels.attention.configs import Key
from tangent_kernels.timing import Captured, capture_many, medians
from tqdm import tqdm
from triton.errors import TritonError

from tools.kernels.resources import Resources, resources
from tools.kernels.samples import Case, launch_of, variants_of
from tools.machine import cpu

# Batch, heads, tokens that candidates are timed on, by head dimension.
SHAPES = {
    64: [(64, 12, 197), (2, 12, 4096)],
    128: [(64, 6, 197), (2, 12, 4096)],
    256: [(64, 3, 197), (2, 6, 2048)],
}
SMALLEST = Config(16, 16, 8, 1)  # used where no candidate fits into shared memory
SURVIVORS = 2  # spill-free candidates that end the search
TIMED = 4  # candidates of a key that are timed, where there is a GPU
LIMIT = {16: configs.TRIED, 32: 4}  # bits -> candidates of a key that are compiled at most
# The variants that take the most registers: heads of 64 must not spill with any of them. Tiles for
# heads of 128 must not spill with heads of 96, which do not fill them.
HUNGRY = ("additive", "boolean", "dropout", "causal")


def main() -> None:
    options = _parse()
    keys = _keys(options.arch, options.directions, options.dims)
    timed = torch.cuda.is_available() and not options.screen
    if timed:
        major, minor = torch.cuda.get_device_capability()
        keys = [key for key in keys if key.arch == configs.family(10 * major + minor)]
    folder = options.out or configs.TABLE.parent
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Key, list[Config]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        search = functools.partial(_search, wanted=TIMED if timed else 1)
        for key, survivors in tqdm(pool.imap_unordered(search, keys), "kernels", len(keys)):
            found[key] = survivors
            if timed:
                found[key], times[" ".join(map(str, key))] = _timed(key, survivors)
                text = json.dumps(times, indent=1)
                (folder / "timings.json").write_text(text + "\n", encoding="utf-8")
            chosen = {key: some[0] for key, some in found.items() if some}
            write_table(folder / configs.TABLE.name, [*found], chosen, timed)


def screen(key: Key, wanted: int) -> list[Config]:
    """The best candidates that fit, best first; if none fits, the one that spills least.

    Kernels of several tangents are optional: where none fits the list is empty.
    """
    measured: dict[Config, Resources] = {}
    holding: list[Config] = []
    several = key.direction in ("forward x2", "forward x4")
    for config in configs.candidates(key) or [SMALLEST]:
        if len(holding) >= max(wanted, SURVIVORS) or len(measured) >= LIMIT[key.bits]:
            break
        if any(_hopeless(config, other, measured[other]) for other in measured):
            continue
        if found := _compile(key, config):
            measured[config] = found
            if not found.spilled and not (several and key.arch != 80 and not _wide(found)):
                holding += [config] if _holds(key, config) else []

    def cost(config: Config) -> float:
        found = measured[config]
        return configs.cost(key, config, found.blocks(key.arch), _wide(found))

    if holding or several:
        return sorted(holding, key=cost)[:wanted]
    ranked = sorted(measured, key=lambda config: (measured[config].spilled, cost(config)))
    return ranked[:1] or [SMALLEST]


def _holds(key: Key, config: Config) -> bool:
    """Whether calls that take more registers do not spill either: see HUNGRY."""
    if key.bits == 32 or key.dim == 256:
        return True
    if key.dim == 128:
        calls = [("plain", 96)]
    else:
        calls = [(variant, 64) for variant in variants_of(key) if variant in HUNGRY]
    archs = (80, 86) if key.arch == 80 else (key.arch,)
    found = (_compile(key, config, *call, arch) for call in calls for arch in archs)
    return all(one is not None and not one.spilled for one in found)


def _hopeless(config: Config, other: Config, found: Resources) -> bool:
    """Whether a smaller tile of as many warps spilled so much that this one will, too."""
    return (
        found.spilled > 64
        and config.num_warps == other.num_warps
        and config.rows >= other.rows
        and config.cols >= other.cols
    )


def _compile(
    key: Key, config: Config, variant: str = "plain", dim: int = 0, arch: int = 0
) -> Resources | None:
    """A candidate's resources; None if it does not compile or exceeds shared memory."""
    dtype = torch.bfloat16 if key.bits == 16 else torch.float32
    case = Case(key.direction, arch or key.arch, dtype, dim or key.dim, variant)
    try:
        found = resources(launch_of(case, config), case.arch)
    except (TritonError, RuntimeError):
        return None
    # sm_86 takes sm_80's tiles, and has less.
    excess = found.excess(86 if key.arch == 80 else case.arch)
    return None if excess or not found.matrix else found


def _wide(found: Resources) -> bool:
    return found.hgmma + found.utcmma > 0


def _search(key: Key, wanted: int) -> tuple[Key, list[Config]]:
    return key, screen(key, wanted)


def _timed(key: Key, survivors: list[Config]) -> tuple[list[Config], dict[str, list[float]]]:
    """The candidates and the present tiles, fastest first, and the microseconds of each."""
    present = configs.table().get(key)
    seconds = time_candidates(key, [*dict.fromkeys([*([present] if present else []), *survivors])])
    found = {
        " ".join(map(str, astuple(config))): [round(1e6 * each, 2) for each in times]
        for config, times in seconds.items()
    }
    return [*seconds], found


def time_candidates(key: Key, candidates: Iterable[Config]) -> dict[Config, list[float]]:
    """Median seconds of each on SHAPES, the fastest by geometric mean first.

    Candidates that the GPU refuses are left out.
    """
    dtype = torch.bfloat16 if key.bits == 16 else torch.float32
    times: dict[Config, list[float]] = {config: [] for config in candidates}
    for batch, heads, tokens in SHAPES[key.dim]:
        case = Case(key.direction, key.arch, dtype, key.dim)
        case = replace(case, batch=batch, heads=heads, tokens=tokens)
        graphs: dict[Config, Captured] = {}
        for config in [*times]:
            try:
                graphs[config] = capture_many(_calls(case, config))
            except (TritonError, RuntimeError) as problem:
                print(f"{case.name}, {config}: {problem}", file=sys.stderr)
                del times[config]
        for config, seconds in zip(graphs, medians([*graphs.values()]), strict=True):
            times[config].append(seconds)
    order = sorted(times, key=lambda config: statistics.geometric_mean(times[config]))
    return {config: times[config] for config in order}


def _calls(case: Case, config: Config) -> list[Callable[[], object]]:
    """The launch on as many sets of operands as it takes to leave none in the GPU's L2 cache."""
    first = launch_of(case, config, "cuda")
    cache = torch.cuda.get_device_properties().L2_cache_size
    count = max(1, math.ceil(2 * cache / _bytes(first)))
    return [first.run, *(launch_of(case, config, "cuda").run for _ in range(1, count))]


def _bytes(launch: Launch) -> int:
    """Of the tensors among a launch's arguments."""
    arguments = (x if isinstance(x, tuple) else (x,) for x in launch.arguments.values())
    tensors = (x for some in arguments for x in some if isinstance(x, torch.Tensor))
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


def write_table(path: Path, keys: list[Key], chosen: dict[Key, Config], timed: bool) -> None:
    """Write the table; entries of other keys stay."""
    table = json.loads(configs.TABLE.read_text(encoding="utf-8"))
    old = configs.table().items()
    entries = {key: config for key, config in old if key not in keys and not _left_out(key)}
    entries |= chosen
    made: dict[str, Any] = table.get("made", {})
    for arch in {key.arch for key in keys}:
        made[str(arch)] = {
            "how": "timed" if timed else "compile-only screen",
            "machine": torch.cuda.get_device_name() if timed else cpu(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "triton": triton.__version__,
            "torch": torch.__version__,
        }
    tree: dict[str, Any] = {}
    order = sorted(entries, key=lambda k: (*k[1:], configs.DIRECTIONS.index(k.direction)))
    for key in order:
        by_dim = tree.setdefault(str(key.arch), {}).setdefault(str(key.bits), {})
        by_dim.setdefault(str(key.dim), {})[key.direction] = list(astuple(entries[key]))
    content = {
        "entries": "configs[arch][bits][dim][direction] = rows, cols, warps, stages",
        "made": dict(sorted(made.items(), key=lambda item: int(item[0]))),
        "configs": tree,
    }
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text)
    path.write_text(text + "\n", encoding="utf-8")


def _keys(archs: list[int], directions: list[str], dims: list[int]) -> list[Key]:
    keys = (
        Key(direction, arch, bits, dim)
        for dim in dims
        for bits in (16, 32)
        for arch in archs
        for direction in directions
    )
    return [key for key in keys if not _left_out(key)]


def _left_out(key: Key) -> bool:
    """Whether no tiles are stored for the key: see `configs.key_of`."""
    if key.bits == 32 and key.arch != 80:
        return True
    several = {"forward x2": 128, "forward x4": 64}.get(key.direction)
    return several is not None and (key.bits == 32 or key.dim > several)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screen", action="store_true", help="do not time, even with a GPU")
    parser.add_argument("--arch", type=int, nargs="+", choices=configs.ARCHS, default=configs.ARCHS)
    parser.add_argument(
        "--directions", nargs="+", choices=configs.DIRECTIONS, default=configs.DIRECTIONS
    )
    parser.add_argument("--dims", type=int, nargs="+", choices=configs.DIMS, default=configs.DIMS)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder for the table, instead of the package's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
