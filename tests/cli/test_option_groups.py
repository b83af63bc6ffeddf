"""Each field of an options dataclass is an option and is read as its type."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from tangent_ops.cli.anchor_options import AnchorOptions
from tangent_ops.cli.assignment import Assignment
from tangent_ops.cli.finetune import ANCHOR, ASSIGNMENT, RECIPE
from tangent_ops.cli.machines import HELPS, Machines
from tangent_ops.cli.options import Group, grouped
from tangent_ops.errors import ArgumentError
from tangent_ops.shards import ShardRecipe


@dataclass(frozen=True)
class Oven:
    """Five kinds of option."""

    heat: float = 180.0
    mode: Literal["top", "fan"] = "top"
    grill: bool = False
    light: bool = True
    shelf: int | None = 2

    def __post_init__(self) -> None:
        if self.heat > 300:
            raise ArgumentError(f"heat must be at most 300, got {self.heat}")


HELP = {field.name: "Help." for field in fields(Oven)}
OVEN = Group(Oven, {None: HELP}, texts={"shelf": lambda text: None if text == "no" else int(text)})
BAKED: list[object] = []


def bake(cake: str, oven: Annotated[Oven, OVEN], tins: int = 1) -> None:
    BAKED[:] = [cake, oven, tins]


def run(*words: str):
    app = typer.Typer()
    app.command()(grouped(bake))
    BAKED.clear()
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("words", "oven"),
    [
        ([], Oven()),
        (["--heat", "200", "--mode", "fan", "--grill"], Oven(200.0, "fan", True)),
        (["--no-light", "--shelf", "no"], Oven(light=False, shelf=None)),
    ],
)
def test_a_command_gets_the_object(words, oven):
    assert run("pie", *words, "--tins", "3").exit_code == 0
    assert ["pie", oven, 3] == BAKED


@pytest.mark.parametrize("words", [["--mode", "ice"], ["--no-grill"], ["--heat", "301"]])
def test_other_values_are_refused(words):
    assert run("pie", *words).exit_code == 2
    assert not BAKED


@pytest.mark.parametrize(
    ("kind", "helps", "no_option"),
    [
        (ShardRecipe, RECIPE.helps, set()),
        (AnchorOptions, ANCHOR.helps, {"seed"}),  # the recipe's
        (Assignment, ASSIGNMENT.helps, set()),
        (Machines, {"Machines": HELPS}, set()),
    ],
)
def test_every_field_is_an_option(kind, helps, no_option):
    named = [name for panel in helps.values() for name in panel]
    assert {field.name for field in fields(kind)} - no_option == {*named}
    assert len(named) == len({*named})
