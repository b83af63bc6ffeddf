"""Which architectures linearize, and how exactly: `python -m tools.coverage`."""
