"""Code on pages of docs/ starts from this: a small ViT, and 12 random images in three shards."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Subset, TensorDataset

import tangent_ops
from tangent_ops.exact import Problem


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


torch.manual_seed(0)
vit = model = VisionTransformer(
    img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=5
)
torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.2)  # timm's starts at zero
tangent = tangent_ops.linearize(model)

train_set = TensorDataset(images(12, seed=1), torch.arange(12) % 4)
shards = {
    "customer-6": Subset(train_set, range(0, 4)),
    "customer-7": Subset(train_set, range(4, 8)),
    "customer-8": Subset(train_set, range(8, 12)),
}
retain_set = Subset(train_set, range(8))
images_to_forget = Subset(train_set, [4])
public_set = TensorDataset(images(8, seed=7), torch.arange(8) % 4)
validation_set = TensorDataset(images(4, seed=5), torch.arange(4))
inputs, targets = images(2, seed=6), torch.arange(2)

shard_deltas = {}
for name, shard in shards.items():
    tangent.zero_()
    tangent_ops.fit_exact(Problem(tangent, shard, l2=10.0, progress=False))
    shard_deltas[name] = tangent.delta_dict()
