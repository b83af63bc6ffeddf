"""Renders self-contained HTML pages that share one layout and style: no script, no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tangent_ops.errors import UnsupportedError

_LAYOUT = Path(__file__).parent


def rendered(template: Path, **values: Any) -> str:
    """The page of a template that extends ``page.html.j2``; all values are escaped.

    Args:
        template: its file.
        values: what the template names.

    Raises:
        UnsupportedError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError('pages need jinja2: pip install "tangent-ops[cli]"') from error
    loader = FileSystemLoader([template.parent, _LAYOUT])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
