"""The attention kernels, and what their launchers refuse, interpreted."""

from tests.kernels.interpreted import interpret


def test_on_the_cpu() -> None:
    interpret(
        "kernels/test_attention_kernels.py",
        "kernels/test_attention_masks.py",
        "kernels/test_attention_arguments.py",
    )
