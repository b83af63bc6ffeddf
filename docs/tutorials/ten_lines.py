# %% [markdown]
# # Ten lines, on real digits
#
# A ViT is adapted to the images of five customers. Then one customer and one image are taken out
# again, bit for bit as if they had never been there. The images are the 1,797 handwritten digits
# that come with scikit-learn, so nothing is downloaded, and all of it takes seconds on one core.
#
# This page is [a script in cells](ten_lines.py), which Jupytext, VS Code and PyCharm open as a
# notebook. The numbers and pictures below are what its cells printed when this page was built;
# [the notebook](ten_lines.ipynb) has them, too.
#
# ## Images

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Subset, TensorDataset

import tangent_ops

torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
labels = torch.tensor(labels)
order = torch.randperm(len(labels))
images, labels = images[order], labels[order]

digits = TensorDataset(images, labels)
public_set = Subset(digits, range(150))  # images that never have to be forgotten
test_set = Subset(digits, range(1300, 1797))

# %% [markdown]
# The five customers have about 100 images each, nine of ten of two digits.

# %% alt="The first 12 digits of each of the five customers: mostly two digits in each row"
private = labels[150:650]
favourite = private // 2  # customer 0 has most of the zeros and ones, and so on
elsewhere = torch.rand(len(private)) < 0.1
owner = torch.where(elsewhere, torch.randint(5, private.shape), favourite)
shards = {
    f"customer-{k}": Subset(digits, (150 + torch.where(owner == k)[0]).tolist()) for k in range(5)
}

figure, axes = plt.subplots(5, 12, figsize=(8, 3.6))
figure.suptitle("The first 12 images of each customer")
for row, shard in zip(axes, shards.values(), strict=True):
    for number, cell in enumerate(row):
        image, _ = shard[number]
        cell.imshow(image[0], cmap="gray_r")
        cell.axis("off")

# %% [markdown]
# ## A pre-trained model
#
# Elsewhere this is one line: `timm.create_model(..., pretrained=True)`. Here a small ViT learns
# from the 150 public images.

# %%
vit = VisionTransformer(
    img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=3
)
optimizer = torch.optim.AdamW(vit.parameters(), lr=0.01, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=250)
for _ in range(250):
    batch = torch.randint(150, (64,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(vit(images[batch]), labels[batch]).backward()
    optimizer.step()
    schedule.step()

print(f"of the test images recognised: {tangent_ops.accuracy(vit, test_set):.1%}")

# %% [markdown]
# ## The ten lines
#
# The customers' statistics are computed apart, in any order, anywhere: one pass over the images
# each, without training. Their sum determines the best tangent model of all images.

# %%
basis = tangent_ops.core_basis(vit, public_set, directions=128)  # the directions that matter
tangent = tangent_ops.linearize(vit, core=basis)
ledger = tangent_ops.StatisticsLedger("ledger", anchor=tangent)
parts = {name: tangent_ops.statistics(tangent, shard) for name, shard in shards.items()}
for name, part in parts.items():
    ledger.add(name, part)
tangent.load_delta_dict(ledger.choose().delta)

accuracy = {"public images only": tangent_ops.accuracy(vit, test_set)}
accuracy["all five customers"] = tangent_ops.accuracy(tangent, test_set)
print(f"of the test images recognised: {accuracy['all five customers']:.1%}")

# %% [markdown]
# ## Forgetting
#
# Customer 1 leaves, who had most of the twos and threes. The statistics are subtracted, and the
# sum is solved again: no image is read.

# %%
ledger.forget("customer-1")
tangent.load_delta_dict(ledger.choose().delta)
print(f"of the test images recognised: {tangent_ops.accuracy(tangent, test_set):.1%}")

# %% [markdown]
# One image of customer 3 has to go, too. Only that image is read again.

# %%
one = Subset(shards["customer-3"], [0])
ledger.forget_samples("customer-3", tangent_ops.statistics(tangent, one))
tangent.load_delta_dict(ledger.choose().delta)

# %% [markdown]
# The proof: somebody who never had these images computes the same model from the others, bit for
# bit.

# %%
kept = []
for name, shard in shards.items():
    first = 1 if name == "customer-3" else 0
    kept += [] if name == "customer-1" else list(shard.indices)[first:]
never = tangent_ops.statistics(tangent, Subset(digits, kept)).choose().delta
same = all(torch.equal(delta, never[name]) for name, delta in tangent.deltas().items())
print(f"the same bits as from the other {len(kept)} images: {same}")
assert same

# %% [markdown]
# ## What a customer is worth
#
# Each customer in turn is left out of the sum. The picture shows what the others' sum recognises.

# %% alt="Bars: test images recognised by the public model, by all customers' sum, and without each"
for left_out in parts:
    others = [part for name, part in parts.items() if name != left_out]
    tangent.load_delta_dict(sum(others[1:], others[0]).choose().delta)
    accuracy[f"without {left_out.replace('-', ' ')}"] = tangent_ops.accuracy(tangent, test_set)

figure, axis = plt.subplots(figsize=(7, 2.6))
figure.suptitle("Test images that are recognised")
bars = axis.barh(list(accuracy), [100 * value for value in accuracy.values()], color="#4c72b0")
axis.bar_label(bars, fmt="%.1f %%", padding=4)
axis.invert_yaxis()
axis.set_xlim(0, 110)
axis.set_xlabel("%")
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Without a customer, the sum has hardly seen two of the digits, and is worse at them than the
# model of the public images. With 497 test images the standard error of an accuracy is about 1.5
# points: differences below that say nothing. The theorem is on the page on
# [statistics](../promises/statistics.md); the page on [the ledger](../promises/ledger.md) says what
# is forgotten, and what is not.
