"""The code of cluster.md starts from this: what torchrun sets, a small ViT, images."""

import os

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

from tangent_ops import last_blocks, linearize

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

torch.manual_seed(0)
model = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=2)
torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.2)  # timm's starts at zero
tangent = linearize(model, last_blocks(model, 1))
data = TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8))
