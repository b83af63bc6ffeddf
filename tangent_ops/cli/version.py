"""The version of tangent-ops."""

from importlib import metadata


def version() -> str:
    """The installed package's version, or "(not installed)" if it runs from its sources."""
    try:
        return metadata.version("tangent-ops")
    except metadata.PackageNotFoundError:
        return "(not installed)"
