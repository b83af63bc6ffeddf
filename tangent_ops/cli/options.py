"""Makes command options from the fields of a dataclass, with their types and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tangent_ops.cli.messages import errors

PANELS = (None, "Data", "Anchor", "Training", "Shards", "Machines", "Privacy")  # in this order


@dataclass(frozen=True)
class Group:
    """Options that a command takes as one object: ``name: Annotated[Kind, Group(Kind, ...)]``.

    Args:
        kind: the dataclass.
        helps: panel -> field -> help. Other fields are not options.
        texts: field -> function that reads it from text.
        undecided: fields that are None if the option is not given; `build` decides.
        build: function of the options, by name, that returns the object; None for `kind`. It may
            raise a TangentOpsError.
    """

    kind: Callable[..., Any]
    helps: Mapping[str | None, Mapping[str, str]]
    texts: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    undecided: frozenset[str] = frozenset()
    build: Callable[..., Any] | None = None

    def parameters(self) -> list[inspect.Parameter]:
        """One parameter per option, with its Annotated type for Typer."""
        hints = get_type_hints(self.kind)
        defaults = {one.name: one.default for one in fields(self.kind)}  # pyright: ignore
        found = []
        for panel, helps in self.helps.items():
            for name, text in helps.items():
                hint, default = hints[name], defaults[name]
                if name in self.undecided:
                    hint, default = hint | None, None
                if name in self.texts:
                    hint, default = str, str(default)
                # Typer would give a switch that is off a second name, --no-NAME.
                names = [f"--{name.replace('_', '-')}"] if default is False else []
                option = typer.Option(*names, help=text, rich_help_panel=panel)
                found.append(_parameter(name, Annotated[hint, option], default))
        return found

    def read(self, values: dict[str, Any]) -> Any:
        """Return the object; remove its options from `values`."""
        names = [name for helps in self.helps.values() for name in helps]
        own = {name: values.pop(name) for name in names}
        with errors():
            own |= {name: read(own[name]) for name, read in self.texts.items()}
            return (self.build or self.kind)(**own)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of its groups as parameters, as Typer needs them."""
    groups: dict[str, Group] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        extras = get_args(hints[name])[1:] if get_origin(hints[name]) is Annotated else ()
        if extras and isinstance(extras[0], Group):
            groups[name] = extras[0]
            parameters += extras[0].parameters()
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))
    parameters.sort(key=lambda parameter: PANELS.index(_panel(parameter)))

    def run(**values: Any) -> None:
        read = {name: group.read(values) for name, group in groups.items()}
        command(**values, **read)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _panel(parameter: inspect.Parameter) -> str | None:
    options = get_args(parameter.annotation)[1:]
    return getattr(options[0], "rich_help_panel", None) if options else None
