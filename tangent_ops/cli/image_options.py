"""Options of commands that read labelled images."""

from __future__ import annotations

from typing import Annotated

import typer

Reader = Annotated[str, typer.Option(help="Use another reader: torch/NAME, hfds/NAME or wds/NAME.")]
Split = Annotated[
    str, typer.Option(help="Split of the data set; a sub-folder of DATA, if there is one.")
]
