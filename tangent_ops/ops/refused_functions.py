"""Says the way out where PyTorch refuses forward mode in a checkpoint or in FSDP.

Both call an autograd Function that has no forward-mode derivative. PyTorch's error says how to
write such a Function, which is no help to those who only use it.
"""

from __future__ import annotations

from pathlib import Path

from torch.autograd import function
from torch.utils import checkpoint

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.checkpoint_guard import CHECKPOINT_MESSAGE

_FSDP_MESSAGE = (
    "a dual_level() around a module under fully_shard, whose hooks have no forward-mode "
    "derivative there. Use torch.func.jvp instead of the level"
)


def explain(error: BaseException | None) -> None:
    """Raise an error with the way out, if PyTorch's ``error`` is about such a Function.

    Raises:
        UnsupportedError: It is.
    """
    if error is None:
        return
    if type(error) not in (RuntimeError, NotImplementedError):  # the latter: torch 2.11
        return
    here = error.__traceback__
    codes = []
    while here is not None:
        codes.append(here.tb_frame.f_code)
        here = here.tb_next
    while codes and codes[-1].co_filename == function.__file__:  # Function.apply and jvp
        codes.pop()
    if not codes:
        return
    name, file = codes[-1].co_name, codes[-1].co_filename
    if file == checkpoint.__file__ and name in ("checkpoint", "_checkpoint_impl"):
        raise UnsupportedError(CHECKPOINT_MESSAGE) from error
    if "_fully_shard" in Path(file).parts and name == "_register_post_backward_hook":
        raise UnsupportedError(_FSDP_MESSAGE) from error
