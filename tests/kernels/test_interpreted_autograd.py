"""Attention under transforms, its accuracy, whole models, interpreted."""

from tests.kernels.interpreted import interpret


def test_on_the_cpu() -> None:
    interpret(
        "kernels/test_attention_autograd.py",
        "kernels/test_attention_numerics.py",
        "kernels/test_models.py",
        "kernels/test_rivals.py",
    )
