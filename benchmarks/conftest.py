"""pytest's options and hooks for the suite: what to measure, and what becomes of the numbers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from benchmarks.suite.session import SESSION, Session


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tangent-ops suite")
    group.addoption(
        "--extent",
        choices=("default", "full"),
        default="default",
        help="cases: those that fit into minutes (default), or all",
    )
    group.addoption(
        "--seconds", type=float, default=1.0, help="for the timed rounds of a case (default: 1)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seconds <= 0:
        raise pytest.UsageError(f"--seconds={config.option.seconds}: expected more than 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[SESSION] = Session(device, config.option.extent, config.option.seconds)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(config.stash[SESSION].result().environment)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict[str, Any]
) -> None:
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)  # single calls: most of the file, read by nobody
    output_json["tangent_ops"] = config.stash[SESSION].result().to_json()


def pytest_terminal_summary(config: pytest.Config) -> None:
    result = config.stash[SESSION].result()
    if not result.rows:
        return
    if importlib.util.find_spec("rich") is None:  # a GPU machine where nothing can be installed
        print("\nno table without rich: `python -m benchmarks.table FILE` shows the JSON elsewhere")
        return
    from benchmarks.console import wide_console
    from benchmarks.table import print_table

    print_table(wide_console(), result)


def pytest_unconfigure(config: pytest.Config) -> None:
    if SESSION in config.stash:
        config.stash[SESSION].close()
