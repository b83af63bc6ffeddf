"""The contract of all dual operations, interpreted."""

from tests.kernels.interpreted import interpret


def test_on_the_cpu() -> None:
    interpret("ops/test_dual_ops.py", "kernels/test_dual_op_kernels.py")
