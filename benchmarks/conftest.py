"""pytest's options, fixtures and hooks for the benchmarks.

A benchmark is a function ``test_GROUP(provider, benchmark)`` in a module that has a ``SUITE``: it
runs for each case of the group and each provider. Other benchmarks are plain pytest-benchmark.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import subprocess
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.case import Case, clock_of
from benchmarks.measure import Contender, NotTimedError, Prepared, free_memory
from benchmarks.roofline import measure_ceilings
from tangent_ops.model.allocator import keep_memory
from tangent_ops.profiling.environment import malloc
from tools.machine import about, cpu, cpuinfo


@dataclass
class Run:
    """One run of the benchmarks."""

    device: torch.device  # where the suites compute
    stream: torch.cuda.Stream | None  # on CUDA, where everything runs
    prepared: Prepared | None = None  # the last one
    not_timed: dict[tuple[Case, str], NotTimedError] = field(default_factory=dict)  # by provider
    ceilings: dict[str, float] = field(default_factory=dict)  # measured where they are written


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tangent-ops benchmarks")
    words = "cases: attention's home shapes, those that fit into minutes (default), or all"
    extents = ("home", "default", "full")
    group.addoption("--extent", choices=extents, default="default", help=words)
    words = "how often the providers of a case are timed in turns, so that a slow minute of the "
    words += "machine affects all of them (default: 1)"
    group.addoption("--turns", type=int, default=1, help=words)


def pytest_configure(config: pytest.Config) -> None:
    if (turns := config.option.turns) <= 0:
        raise pytest.UsageError(f"--turns={turns}: expected more than 0")
    keep_memory()  # before the first model that is not linearized, too
    cuda = torch.cuda.is_available()
    stream = torch.cuda.Stream() if cuda else None
    config.stash[RUN] = Run(torch.device("cuda" if cuda else "cpu"), stream)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A backward pass runs on the stream of its forward pass, and the default is not captured."""
    with torch.cuda.stream(item.config.stash[RUN].stream):
        return (yield)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite: Any = getattr(metafunc.module, "SUITE", None)
    if suite is None or "provider" not in metafunc.fixturenames:
        return
    device, options = metafunc.config.stash[RUN].device, metafunc.config.option
    group = metafunc.function.__name__.removeprefix("test_").replace("_", "-")
    params = []
    for case in suite.cases(device, options.extent):
        marks = pytest.mark.benchmark(group=f"{group} {case}", timer=clock_of(device))
        for turn in range(options.turns):
            for provider in suite.providers(case) if case.group == group else ():
                if turn and provider.missing(case, device):
                    continue
                name = f"{case} {provider.name}{f' turn {turn + 1}' if turn else ''}"
                values = (case, (provider, turn))
                params.append(pytest.param(*values, id=name.replace(" ", "-"), marks=marks))
    metafunc.parametrize(("case", "provider"), params, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Prepared:
    """The case with operands and exact answer; kept until the next case."""
    run = request.config.stash[RUN]
    if run.prepared is None or run.prepared.case != request.param:
        run.prepared = None
        free_memory()
        run.prepared = Prepared(request.module.SUITE, request.param, run.device)
    return run.prepared


@pytest.fixture
def provider(request: pytest.FixtureRequest, case: Prepared) -> Contender:
    """The provider, checked; a wrong one is skipped with the reason, and fails if it is ours."""
    run, (one, turn) = request.config.stash[RUN], request.param
    try:
        if (case.case, one.name) in run.not_timed:  # in an earlier turn
            raise run.not_timed[case.case, one.name]
        call = case.checked_call(one)
    except NotTimedError as problem:
        run.not_timed[case.case, one.name] = problem
        ours = one == case.suite.providers(case.case)[0] and problem.status != "absent"
        end = pytest.fail if ours else pytest.skip
        end(f"{one.name}: {problem.status}: {problem}")
    return Contender(case, one, call, request.config.option.turns, turn)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info["cpu"] = cpu()  # pytest-benchmark's has the clock of the moment


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict[str, Any]
) -> None:
    run = config.stash[RUN]
    run.ceilings = run.ceilings or measure_ceilings(run.device)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)  # single rounds: most of the file, read by nobody
        entry["params"] = None  # objects; extra_info says it in words
    output_json["tangent_ops"] = {
        "environment": environment(run.device),
        "ceilings": run.ceilings,
        "not_timed": [
            {"case": vars(case), "provider": name, "status": why.status, "note": str(why)}
            for (case, name), why in run.not_timed.items()
        ],
    }


def environment(device: torch.device) -> dict[str, str]:
    """Machine, versions, clocks, date and commit, for people to read."""
    triton = importlib.util.find_spec("triton") is not None
    found = about() | {
        "python": platform.python_version(),
        "triton": importlib.import_module("triton").__version__ if triton else "not installed",
        "fp32 products": torch.get_float32_matmul_precision(),
        "threads": str(torch.get_num_threads()),
        "malloc": malloc(),
        "clocks": f"{cpuinfo('cpu MHz')} MHz",
    }
    if device.type == "cuda":
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["TF32 in convolutions"] = str(torch.backends.cudnn.allow_tf32)
        command = f"nvidia-smi --query-gpu={fields} --format=csv,noheader"
        found["clocks"] = f"{fields}: {subprocess.getoutput(command)}"
    return found
