"""The arithmetic of docs/cluster.md: ViT-L on 8 H200, 1,000 customers. Counted, nothing measured.

python -m benchmarks.cluster_arithmetic
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops.model.linearize import last_blocks
from tangent_ops.model.low_rank import has_low_rank

MODEL, CLASSES = "vit_large_patch16_224", 1000
CUSTOMERS, IMAGES, EPOCHS = 1000, 1000, 15
GPUS, PEAK, SHARE = 8, 989e12, 0.4  # dense bf16 of an H200 as published; the share is assumed
DISK = 2e9  # bytes a second, read: assumed
KINDS = (("TAFT-1", 1), ("TAFT-3", 3), ("TAFT-all", None))


@dataclass(frozen=True)
class Kind:
    """What one way of training costs.

    Attributes:
        name: TAFT-1, say.
        parameters: trained, and so in a delta.
        forward: FLOPs of the trained part's ordinary forward pass, of one image.
        frozen: FLOPs of the part below it.
    """

    name: str
    parameters: int
    forward: float
    frozen: float

    @property
    def cached(self) -> float:
        """FLOPs of a shard: the frozen part once an image, a step 5 forward passes of the rest."""
        return IMAGES * (self.frozen + EPOCHS * 5 * self.forward)

    @property
    def augmented(self) -> float:
        """FLOPs of a shard whose images are drawn anew: the frozen part in every epoch."""
        return IMAGES * EPOCHS * (self.frozen + 5 * self.forward)


def count() -> tuple[int, float, list[Kind]]:
    """Parameters of the model, FLOPs of its forward pass, and what each kind trains."""
    with torch.device("meta"):
        model = timm.create_model(MODEL, num_classes=CLASSES)
        inputs = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(inputs)
    total = float(counter.get_total_flops())
    tokens = torch.empty(1, 197, 1024, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.blocks[0](tokens)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    block = float(counter.get_total_flops())
    kinds = []
    for name, blocks in KINDS:
        pattern = "" if blocks is None else last_blocks(model, blocks)
        trained = [p for n, p in model.named_parameters() if re.search(pattern, n)]
        frozen = 0.0 if blocks is None else total - blocks * block - _head(model)
        kinds.append(Kind(name, sum(p.numel() for p in trained), total - frozen, frozen))
    return sum(p.numel() for p in model.parameters()), total, kinds


def low_rank(rank: int = 8) -> int:
    """Parameters of a delta of low rank, every parameter trained."""
    with torch.device("meta"):
        model = timm.create_model(MODEL, num_classes=CLASSES)
    chosen = dict(model.named_parameters())
    low = {name for name, parameter in chosen.items() if has_low_rank(parameter, rank)}
    return sum(len(p) * rank if n in low else p.numel() for n, p in chosen.items())


def table() -> str:
    """The page's table, in Markdown."""
    parameters, forward, kinds = count()
    rows = [
        f"`{MODEL}` has {parameters / 1e6:.1f} million parameters; a forward pass of one image is "
        f"{forward / 1e9:.1f} GFLOP (matrix products, two to a multiply-add).",
        "",
        "| | " + " | ".join(kind.name for kind in kinds) + " |",
        "| --- |" + " --- |" * len(kinds),
    ]

    def row(name: str, *values: str) -> None:
        rows.append(f"| {name} | " + " | ".join(values) + " |")

    seconds = GPUS * PEAK * SHARE
    row("trained parameters", *(f"{k.parameters / 1e6:.1f} M" for k in kinds))
    row("one delta, float32", *(f"{4 * k.parameters / 1e6:.0f} MB" for k in kinds))
    row("1,000 deltas", *(f"{4e-9 * CUSTOMERS * k.parameters:.0f} GB" for k in kinds))
    row("and the ledger's copies and sum",
        *(f"{1e-9 * (4 * CUSTOMERS + 8) * k.parameters:.0f} GB" for k in kinds))  # fmt: skip
    row("deltas, gradients, AdamW's two moments, on the GPU",
        *(f"{16 * k.parameters / 1e9:.2f} GB" for k in kinds))  # fmt: skip
    row("one customer, no augmentation", *(f"{k.cached / 1e15:.2f} PFLOP" for k in kinds))
    row("1,000 customers, assumed 40 % of peak",
        *(f"{CUSTOMERS * k.cached / seconds / 60:.1f} min" for k in kinds))  # fmt: skip
    row("the same with augmentation",
        *(f"{CUSTOMERS * k.augmented / seconds / 60:.1f} min" for k in kinds))  # fmt: skip
    row("forget one customer: read, subtract, write",
        *(f"{(4 + 8 + 8) * k.parameters / 1e9:.2f} GB" for k in kinds))  # fmt: skip
    row("forget one image: that shard again, on one GPU",
        *(f"{k.cached / (PEAK * SHARE):.1f} s" for k in kinds))  # fmt: skip
    row("compose anew from 1,000 files, assumed 2 GB/s",
        *(f"{4 * CUSTOMERS * k.parameters / DISK:.0f} s" for k in kinds))  # fmt: skip
    row("inference, of any number of customers, in forward passes",
        *(f"{(k.frozen + 3 * k.forward) / forward:.2f}" for k in kinds))  # fmt: skip
    few = low_rank()
    rows += [
        "",
        f"With `rank=8` every matrix is trained, and a delta has {few / 1e6:.2f} M parameters: "
        f"{4 * few / 1e6:.0f} MB, {4e-9 * CUSTOMERS * few:.0f} GB for 1,000 customers.",
    ]
    return "\n".join(rows)


def _head(model: torch.nn.Module) -> float:
    head = model.get_parameter("head.weight")
    return 2.0 * head.numel()


def main() -> int:
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
