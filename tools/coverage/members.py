"""The models of the sweep: small members of all timm families, and other vision transformers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[torch.Generator], Tensor]]

TIMM, TORCHVISION, TRANSFORMERS, TORCH = "timm", "torchvision", "transformers", "torch"


@dataclass(frozen=True)
class Member:
    """A model with random weights."""

    source: str  # the package that provides it
    family: str  # for timm, its module in `timm.models`
    model: str  # its name in the package
    options: Mapping[str, Any] = field(default_factory=dict)  # make it smaller than its name says
    size: int | None = None  # height and width of its images; None: the model's default

    @property
    def key(self) -> str:
        return f"{self.source} {self.model}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "options": dict(self.options)}

    def build(self) -> Built:
        """The model, and a function that draws a batch of two inputs."""
        return BUILDERS[self.source](self)


# Models too large for two cores: options with fewer blocks, and a smaller image.
REDUCED: dict[str, tuple[dict[str, Any], int | None]] = {
    "beit_base_patch16_224": ({"depth": 4}, None),
    "deepseek_vit_412m": ({"depth": 2}, None),
    "gemma4_vit_167m": ({"depth": 3}, None),
    "mobilenetv5_base": ({}, 128),
    "naflexvit_base_patch16_parfac_gap": ({"depth": 4}, 224),
    "nasnetalarge": ({}, 224),
    "pnasnet5large": ({}, 224),
    "qwen3_vit_88m": ({"depth": 4}, 256),
    "samvit_base_patch16_224": ({"depth": 4, "global_attn_indexes": (1, 3)}, None),
    "vgg11": ({"num_classes": 10}, None),
    "vit_base_patch16_siglip_224": ({"depth": 3}, None),
    "vit_base_patch16_clip_224": ({"depth": 3}, None),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 224}, 224),
    "vit_medium_patch16_rope_reg1_gap_256": ({"depth": 4}, None),
}

# Swept beside the smallest of their family, because they have what that one lacks.
BESIDES = (
    "botnet26t_256",  # relative positions, global
    "lambda_resnet26rpt_256",
    "caformer_s18",
    "convnextv2_atto",
    "coatnet_nano_rw_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "levit_conv_128s",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "resmlp_12_224",
    "mobilenetv4_conv_small",
    "nf_resnet26",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",  # pooled by attention
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",  # parallel branches, normed queries and keys
    "vit_small_patch14_reg4_dinov2",
)

# Random weights of a small configuration of the real class.
TRANSFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}
OTHERS = (
    Member(TORCHVISION, "vision_transformer", "vit_b_16", {"num_layers": 3}),
    Member(TORCHVISION, "swin_transformer", "swin_t"),
    Member(TORCHVISION, "swin_transformer", "swin_v2_t"),
    Member(TRANSFORMERS, "vit", "ViTForImageClassification", TRANSFORMER),
    Member(TRANSFORMERS, "deit", "DeiTForImageClassificationWithTeacher", TRANSFORMER),
    Member(TRANSFORMERS, "clip", "CLIPVisionModel", TRANSFORMER),
    Member(TORCH, "nn.TransformerEncoder", "norm last", {"norm_first": False}),
    Member(TORCH, "nn.TransformerEncoder", "norm first", {"norm_first": True}),
)


def members(only: str = "") -> Iterator[Member]:
    """Installed members whose "source family model" matches the regular expression."""
    matches = re.compile(only).search

    def chosen(one: Member) -> bool:
        return bool(matches(f"{one.source} {one.family} {one.model}"))

    for family, names in _timm_families().items():
        if any(chosen(Member(TIMM, family, name)) for name in names):
            own = [_smallest(names), *(name for name in names if name in BESIDES)]
            for name in dict.fromkeys(own):
                options, size = REDUCED.get(name, ({}, None))
                if chosen(member := Member(TIMM, family, name, options, size)):
                    yield member
    yield from (one for one in OTHERS if importlib.util.find_spec(one.source) and chosen(one))


def _timm_families() -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        if not name.startswith("test_"):
            module = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
            families.setdefault(module, []).append(name)
    return dict(sorted(families.items()))


def _smallest(names: list[str]) -> str:
    """The name with the fewest parameters, counted on the meta device."""

    def count(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    return min(names, key=count)


def _timm(member: Member) -> Built:
    model: Any = timm.create_model(member.model, **member.options)
    config = model.pretrained_cfg
    least = None if config.get("fixed_input_size") else config.get("min_input_size")
    _, height, width = least or config["input_size"]
    if member.size:
        height = width = member.size
    return model, _images(height, width)


def _torchvision(member: Member) -> Built:
    import torchvision

    if member.model != "vit_b_16":
        return torchvision.models.get_model(member.model, **member.options), _images(224, 224)
    shape: dict[str, Any] = {"num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
    model = torchvision.models.VisionTransformer(224, 16, **{**shape, **member.options})
    return model, _images(224, 224)


def _transformers(member: Member) -> Built:
    import transformers  # pyright: ignore[reportMissingImports]

    kind: Any = getattr(transformers, member.model)
    return kind(kind.config_class(**member.options)), _images(64, 64)


def _torch(member: Member) -> Built:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, **member.options)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model, lambda source: torch.randn(2, 17, 64, generator=source)


def _images(height: int, width: int) -> Callable[[torch.Generator], Tensor]:
    return lambda source: torch.randn(2, 3, height, width, generator=source)


BUILDERS: dict[str, Callable[[Member], Built]] = {
    TIMM: _timm,
    TORCHVISION: _torchvision,
    TRANSFORMERS: _transformers,
    TORCH: _torch,
}
