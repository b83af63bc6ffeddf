"""Which architectures linearize, and how exactly: `python -m benchmarks.coverage`."""
