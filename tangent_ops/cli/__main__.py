"""Runs ``python -m tangent_ops.cli``."""

from tangent_ops.cli import main

main()
