"""Python runs this first in every process of a rehearsed GPU check; pytest has a plugin instead."""

import sys

PROGRAMS = ("tools.", "tangent_ops.cli", "from multiprocessing.spawn")

if any(word.startswith(PROGRAMS) for word in sys.orig_argv) and "pytest" not in sys.orig_argv:
    from tools.rehearsal import small

    small.make_small()
