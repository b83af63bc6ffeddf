"""The command line: ``tangent-ops COMMAND``, or ``python -m tangent_ops.cli COMMAND``."""

from __future__ import annotations

import importlib.util
import sys
import warnings

_NEEDED = ("typer", "rich", "jinja2")


def main() -> None:
    """Run the command line; if packages of its extra are missing, print how to install them."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"tangent-ops: the command line needs {', '.join(missing)}: "
            'pip install "tangent-ops[cli]"',
            file=sys.stderr,
        )
        sys.exit(1)
    # torch's own, of its scripted formulas for forward mode: nothing that a user could change.
    warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    try:
        from tangent_ops.cli.app import app

        app(prog_name="tangent-ops")
    except KeyboardInterrupt:  # while modules are imported
        print("error: interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
