"""The version, wherever the package runs from."""

from importlib import metadata


def version() -> str:
    """Of the installed package, or "not installed" where it runs from its sources."""
    try:
        return metadata.version("tangent-ops")
    except metadata.PackageNotFoundError:
        return "(not installed)"
