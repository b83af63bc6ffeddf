"""Tiny Hugging Face models by random configuration, and data that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")

CLASSES = 4
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = VISION | {"vocab_size": 20, "max_position_embeddings": 12, "type_vocab_size": 1}
SIGLIP_TEXT = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}  # else it warns
FAMILIES = (
    "vit", "deit", "deit-distilled", "dinov2", "clip", "siglip", "swin", "bert", "roberta",
)  # fmt: skip
PIXELS = FAMILIES[:7]


def made(family: str, attention: str = "sdpa") -> nn.Module:
    """The model, in eval mode, with weights that no symmetry hides."""
    t = transformers
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1]}
    configs: dict[str, Any] = {
        "vit": lambda: (t.ViTForImageClassification, t.ViTConfig(**VISION)),
        "deit": lambda: (t.DeiTForImageClassification, t.DeiTConfig(**VISION)),
        "deit-distilled": lambda: (
            t.DeiTForImageClassificationWithTeacher, t.DeiTConfig(**VISION)),
        "dinov2": lambda: (t.Dinov2ForImageClassification, t.Dinov2Config(**VISION, mlp_ratio=2)),
        "clip": lambda: (
            t.CLIPForImageClassification, t.CLIPConfig(vision_config=dict(VISION))),
        "siglip": lambda: (
            t.SiglipForImageClassification,
            t.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=dict(VISION))),
        "swin": lambda: (
            t.SwinForImageClassification,
            t.SwinConfig(**swin, num_heads=[1, 2, 2], window_size=2, mlp_ratio=2.0)),
        "bert": lambda: (t.BertForSequenceClassification, t.BertConfig(**TEXT)),
        "roberta": lambda: (
            t.RobertaForSequenceClassification, t.RobertaConfig(**TEXT, pad_token_id=0)),
    }  # fmt: skip
    cls, config = configs[family]()
    config.num_labels = CLASSES
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1 if parameter.ndim < 2 else 0.2)
            if name.endswith("lambda1"):
                parameter.add_(0.5)
    return model


class Samples(Dataset):
    """Samples as dicts, as Hugging Face's data sets and processors give them."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.fields.items()}


def inputs(
    family: str, count: int = 10, seed: int = 3, *, padded: bool = True
) -> dict[str, Tensor]:
    """The fields of a batch, without labels."""
    generator = torch.Generator().manual_seed(seed)
    if family in PIXELS:
        side = 16 if family == "swin" else 12
        return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}
    ids = torch.randint(2, 20, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        lengths = torch.randint(3, 7, (count, 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def samples(family: str, count: int = 10, seed: int = 3, *, padded: bool = True) -> Samples:
    """A data set of dicts with labels."""
    fields = inputs(family, count, seed, padded=padded)
    generator = torch.Generator().manual_seed(seed + 1)
    fields["labels"] = torch.randint(CLASSES, (count,), generator=generator)
    return Samples(fields)
