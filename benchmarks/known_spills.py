"""Spilled registers that the compile-only gate admits: those no tile found avoids.

KNOWN_SPILLS[direction, bits, dim][arch] is the most bytes per thread.
"""

TRITON = "3.8"  # whose spills these are; other versions may have fewer

KNOWN_SPILLS: dict[tuple[str, int, int], dict[int, int]] = {}
