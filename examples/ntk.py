"""The empirical neural tangent kernel of a Hugging Face ViT, against torch.func.jacrev.

    python examples/ntk.py --help

K = J Jᵀ holds the products of the samples' Jacobians by the weights. `jacrev` computes J by
pulling back each output of all samples at once, and keeps it: N C P numbers. `TangentKernel` makes
a layer's share of K from what enters the layer and from the cotangents that leave it, and never
keeps J.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import running
import torch
from assets import DemoError
from images import digits
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

from tangent_ops import linearize, pictures
from tangent_ops.exact import Problem, TangentKernel
from tangent_ops.profiling.memory import peak_bytes


def hugging_face_vit(name: str, size: int, classes: int, width: int = 96) -> Any:
    """A ViT for images: with published weights, or small with random ones if `name` is empty.

    Raises:
        DemoError: transformers is not installed, or the weights cannot be had.
    """
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise DemoError(
            "transformers is not installed: pip install 'tangent-ops[huggingface]'"
        ) from error
    if name:
        try:
            return ViTForImageClassification.from_pretrained(
                name, num_labels=classes, ignore_mismatched_sizes=True
            ).eval()
        except OSError as error:
            raise DemoError(
                f"--model {name!r}: no such weights here, and none came from the hub: "
                f"{str(error).splitlines()[0]}"
            ) from error
    config = ViTConfig(
        image_size=size, patch_size=size // 4, hidden_size=width, num_hidden_layers=4,
        num_attention_heads=3, intermediate_size=4 * width,
    )  # fmt: skip
    config.num_labels = classes
    return ViTForImageClassification(config).eval()


def sorted_digits(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) and their digits, as many of each, in the digits' order."""
    pixels, labels = digits()
    each = [(labels == digit).nonzero()[: -(-count // 10), 0] for digit in range(10)]
    picked = torch.cat(each)
    large = F.interpolate(pixels[picked, None], (size, size), mode="bilinear")
    return (2 * large - 1).expand(-1, 3, -1, -1).contiguous(), labels[picked]


def kernel_of(model: nn.Module, images: Tensor, labels: Tensor, progress: bool = True) -> Tensor:
    """K = J Jᵀ, (N, C, N, C) in float64, by this library."""
    tangent = linearize(model)
    data = TensorDataset(images, labels)
    problem = Problem(
        tangent, data, l2=1.0, batch_size=16, representation="factors", progress=progress
    )
    count, outputs = problem.samples, problem.outputs
    return TangentKernel(problem.system).gram.view(count, outputs, count, outputs)


def kernel_by_jacrev(model: nn.Module, images: Tensor) -> Tensor:
    """The same by PyTorch alone: all of J, then its products, in the model's precision."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).logits

    with warnings.catch_warnings():  # torch's own, of its vmap
        warnings.filterwarnings("ignore", "There is a performance drop")
        rows = torch.func.jacrev(logits)(weights)
    count, outputs = next(iter(rows.values())).shape[:2]
    flat = [each.reshape(count * outputs, -1) for each in rows.values()]
    total = sum((each @ each.T for each in flat), start=torch.zeros(()))
    return total.view(count, outputs, count, outputs)


def measured(what: str, call: Callable[[], Tensor]) -> Tensor:
    """What the call gives; prints its time and, of a second call, peak memory."""
    start = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - start
    peak = peak_bytes(call, found.device)
    print(f"  {what:14} {seconds:6.2f} s   peak {peak / 2**20:7.1f} MiB")
    return found


@pictures.styled()
def draw(kernel: Tensor, labels: Tensor) -> Figure:
    """The mean kernel of two samples over the outputs, normalised: 1 on the diagonal."""
    traces = torch.einsum("icjc->ij", kernel)
    scale = traces.diagonal().rsqrt()
    figure = pictures.new_figure(5.6, 4.8)
    axes = figure.subplots()
    image = axes.imshow((scale[:, None] * traces * scale).cpu().numpy(), cmap="viridis")
    starts = [int((labels == digit).nonzero()[0]) for digit in labels.unique()]
    each = len(labels) / len(starts)
    axes.set_xticks([s + each / 2 - 0.5 for s in starts], [str(int(labels[s])) for s in starts])
    axes.set_yticks([s + each / 2 - 0.5 for s in starts], [str(int(labels[s])) for s in starts])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=0.6)
        axes.axvline(start - 0.5, color="white", linewidth=0.6)
    axes.set(xlabel="digit in the image", ylabel="digit in the image")
    axes.set_title("Tangent kernel of pairs of images, as a cosine")
    figure.colorbar(image, ax=axes)
    return figure


def run(options: argparse.Namespace) -> float:
    """Compute both kernels, print and draw; give the largest relative difference."""
    if options.images < 1:
        raise DemoError(f"--images {options.images}: expected at least 1")
    torch.manual_seed(options.seed)
    model = hugging_face_vit(options.model, options.size, classes=10)
    images, labels = sorted_digits(options.images, model.config.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters:,} parameters, {len(images)} images, 10 outputs:")
    calls = {
        "tangent_ops": lambda: kernel_of(model, images, labels),
        "torch jacrev": lambda: kernel_by_jacrev(model, images),
    }
    found = [measured(name, call) for name, call in tqdm(calls.items(), disable=None, delay=3)]
    kernel, other = found[0], found[1].double()
    difference = float((kernel - other).abs().max() / other.abs().max())
    print(f"largest difference, relative to the largest entry: {difference:.1e}")
    path = pictures.save(draw(kernel, labels), options.out / "ntk.png")
    print(f"picture: {path}")
    return difference


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--model", default="", help="a model of the hub or a folder; empty: small, random weights")
    add("--images", type=int, default=40, help="images, of scikit-learn's digits")
    add("--size", type=int, default=32, help="side of the images, pixels; of the small model")
    add("--seed", type=int, default=0, help="of random weights")
    add("--out", type=Path, default=Path("out"), help="folder for the picture")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    return running.run(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
