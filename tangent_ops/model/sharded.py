"""Refuses models whose modules the user has put under FSDP."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from tangent_ops.errors import UnsupportedError


def refuse_sharded(model: nn.Module) -> None:
    """Raise UnsupportedError if `fully_shard` has divided a module of the model."""
    # Not imported here: if nobody has, nothing is divided, and the import takes a second.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        raise UnsupportedError(
            "the model is under fully_shard: linearize the whole model, then divide the anchor "
            "with tangent_ops.training.fsdp.fsdp_anchor(tangent)"
        )
