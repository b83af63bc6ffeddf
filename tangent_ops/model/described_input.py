"""`described_input`: a random input of a model that says what it takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def described_input(anchor: nn.Module) -> Tensor | None:
    """A random image of the size in timm's ``pretrained_cfg``, or Hugging Face's ``config``.

    Of a Hugging Face model of texts, random indices of 8 tokens. None if the model tells neither.
    """
    weight = next((p for p in anchor.parameters() if p.is_floating_point()), None)
    if weight is None:
        return None
    generator = torch.Generator().manual_seed(0)
    timms = getattr(anchor, "pretrained_cfg", None)
    size = timms.get("input_size") if isinstance(timms, dict) else None
    if size is None:
        config, main = getattr(anchor, "config", None), getattr(anchor, "main_input_name", None)
        config = getattr(config, "vision_config", config)  # CLIP's and SigLIP's has both towers'
        keys = ("image_size", "num_channels", "vocab_size")
        side, channels, words = (getattr(config, key, None) for key in keys)
        if main == "input_ids" and isinstance(words, int):
            return torch.randint(words, (1, 8), generator=generator).to(weight.device)
        if main != "pixel_values" or not (isinstance(side, int) and isinstance(channels, int)):
            return None
        size = (channels, side, side)
    return torch.randn(1, *size, generator=generator).to(weight.device, weight.dtype)
