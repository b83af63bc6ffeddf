"""Every pair of transforms around attention, interpreted."""

from tests.kernels.interpreted import interpret


def test_on_the_cpu() -> None:
    interpret("ops/test_attention_matrix.py")
