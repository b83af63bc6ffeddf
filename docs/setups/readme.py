"""The code of the README starts from this: random images of customers, and a model with attention.

The README downloads the weights of a ViT. In the tests it gets a small one with random weights.
"""

import torch
from torch.utils.data import Subset, TensorDataset

torch.manual_seed(0)
public_set = TensorDataset(torch.randn(12, 3, 16, 16), torch.arange(12) % 4)
private_set = TensorDataset(torch.randn(12, 3, 16, 16), torch.arange(12) % 4)
shards = {
    "customer-6": Subset(private_set, range(0, 4)),
    "customer-7": Subset(private_set, range(4, 8)),
    "customer-8": Subset(private_set, range(8, 12)),
}
photos = Subset(private_set, [9])  # one of customer-8

model = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True).eval()
x, v = torch.randn(2, 1, 5, 16)
