"""Train a small diffusion transformer by MeanFlow on MNIST-5k, and draw digits in one step.

    python examples/meanflow.py --help

MeanFlow (Geng, Deng, Bai, Kolter, He: "Mean Flows for One-step Generative Modeling", 2025) learns
the average velocity u(z, r, t) on the way from time r to t. Its target has a Jacobian-vector
product through the whole transformer:

    u = v - (t - r) du/dt        du/dt = v ∂u/∂z + ∂u/∂t, tangents (v, 0, 1) of (z, r, t)
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import running
import torch
from assets import DemoError, default_cache
from dit import DiT
from images import digits, mnist
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from tangent_ops import fused_forward_ad, pictures
from tangent_ops.profiling.memory import peak_bytes
from tangent_ops.training.subnormals import flushed_subnormals

STEPS = (1, 2, 4)  # of the samples that are drawn
WARM_UP = 100  # steps in which the learning rate rises
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fused": fused_forward_ad,
    "MATH": lambda: sdpa_kernel(SDPBackend.MATH),
}


def draw_times(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Times r <= t, (count,) each: two logit-normal draws in order; beyond `share` r is t."""
    both = torch.sigmoid(torch.randn(count, 2) - 0.4)
    t, r = both.amax(1), both.amin(1)
    return torch.where(torch.arange(count) < share * count, r, t), t


def average_velocity(
    model: nn.Module,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    v: Tensor,
    labels: Tensor,
    context: Callable[[], AbstractContextManager[Any]] = fused_forward_ad,
) -> tuple[Tensor, Tensor]:
    """u(z, r, t), and what MeanFlow's identity says it should be: v - (t - r) du/dt.

    Args:
        model: u, called with (z, r, t, labels).
        z: (B, 1, S, S), noised images.
        r: (B,), earlier times.
        t: (B,), times of `z`.
        v: (B, 1, S, S), the velocity at `z`.
        labels: (B,), class indices.
        context: What the Jacobian-vector product runs in.

    Returns:
        u, which tracks gradients, and its target, which does not; shaped as `z`.
    """
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    with context():
        u, u_t, *_ = torch.func.jvp(lambda *ztr: model(*ztr, labels), (z, r, t), tangents)
    return u, (v - (t - r).view(-1, 1, 1, 1) * u_t).detach()


def meanflow_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    share: float,
    context: Callable[[], AbstractContextManager[Any]] = fused_forward_ad,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the mean squared error, which unlike the loss can be compared.

    Where r is t the target is v, and an ordinary forward pass is enough.
    """
    r, t = (times.to(images.device) for times in draw_times(len(images), share))
    noise = torch.randn_like(images)
    at = t.view(-1, 1, 1, 1)
    z, v = (1 - at) * images + at * noise, noise - images
    split = math.ceil(share * len(images))
    parts = [(x[:split], x[split:]) for x in (z, r, t, v, labels)]
    (z1, z2), (r1, r2), (t1, t2), (v1, v2), (labels1, labels2) = parts
    u1, target1 = average_velocity(model, z1, r1, t1, v1, labels1, context)
    u2 = model(z2, r2, t2, labels2)
    u, target = torch.cat((u1, u2)).float(), torch.cat((target1, v2)).float()
    error = (u - target).square().flatten(1).mean(1)
    weight = 1 / (error.detach() + 1e-3)  # adaptive: the paper's p = 1
    return (weight * error).mean(), error.detach().mean()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, labels: Tensor, steps: int = 1) -> Tensor:
    """Images (B, 1, S, S) in [-1, 1] from noise of that shape, in `steps` calls of the model."""
    z, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, r in pairwise(times):
        z = z - (t - r) * model(z, r.expand(len(z)), t.expand(len(z)), labels)
    return z.clamp(-1, 1)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> tuple[nn.Module, list[float]]:
    """Train, with a progress bar.

    Args:
        model: Of images like these; it is trained in place.
        images: (N, 1, S, S) in [-1, 1].
        labels: (N,), class indices.
        options: Of the command line: steps, batch, lr, share.

    Returns:
        The average of the weights over the last steps, as a model; and the mean squared error of
        each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    errors = []
    order = torch.randperm(len(images))
    with tqdm(range(options.steps), desc="train", unit="step", disable=None) as bar:
        for step in bar:
            warm = min(1.0, (step + 1) / WARM_UP)
            decay = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
            optimizer.param_groups[0]["lr"] = options.lr * warm * decay
            if len(order) < options.batch:
                order = torch.randperm(len(images))
            picked, order = order[: options.batch], order[options.batch :]
            with mixed_precision(images.device):
                loss, error = meanflow_loss(model, images[picked], labels[picked], options.share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            errors.append(float(error))
            if step % 20 == 0:
                bar.set_postfix(error=f"{sum(errors[-100:]) / len(errors[-100:]):.3f}")
    return average.module, errors


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compare(model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Print time and peak memory of a step, fused and by MATH, measured in turns."""
    device = images.device
    batch = images[: options.batch], labels[: options.batch]

    def step(name: str) -> None:
        model.zero_grad()
        with mixed_precision(device):
            loss, _ = meanflow_loss(model, *batch, 1.0, CONTEXTS[name])
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in CONTEXTS}
    for turn in tqdm(range(9), desc="compare", unit="turn", disable=None):
        for name, found in seconds.items():
            start = time.perf_counter()
            step(name)
            if turn > 1:
                found.append(time.perf_counter() - start)
    tokens = (options.size // options.patch) ** 2
    print(f"a step with jvp of all {options.batch} images, {tokens} tokens, {device.type}:")
    for name, found in seconds.items():
        peak = peak_bytes(lambda name=name: step(name), device)
        print(f"  {name:5}  {1e3 * median(found):7.1f} ms   peak {peak / 2**20:7.1f} MiB")


def recognised(images: Tensor, labels: Tensor, samples: Tensor, wanted: Tensor) -> float:
    """The share of samples that a classifier of the real images takes for the wanted digits."""
    classifier = SVC(C=10).fit(images.flatten(1).cpu(), labels.cpu())
    return float(classifier.score(samples.flatten(1).cpu(), wanted.cpu()))


@pictures.styled()
def draw(rows: dict[str, Tensor]) -> Figure:
    """A grid of digits: groups of rows by name, each (10 k, 1, S, S), a column for each digit."""
    heights = [len(images) // 10 for images in rows.values()]
    width = 5.6  # inches; images are square
    figure = pictures.new_figure(width, 0.1 * width * sum(heights) + 0.28 * len(rows))
    each = figure.subplots(len(rows), 1, height_ratios=heights)
    for axes, (name, images) in zip(each, rows.items(), strict=True):
        size = images.shape[-1]
        grid = images.view(-1, 10, size, size).permute(0, 2, 1, 3).reshape(-1, 10 * size)
        axes.imshow(grid.cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(name)
    return figure


def load(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The images in [-1, 1], (N, 1, size, size), and their digits."""
    pixels, labels = mnist(options.cache) if options.data == "mnist" else digits()
    if pixels.shape[-1] != options.size:
        shape = (options.size, options.size)
        pixels = F.interpolate(pixels[:, None], shape, mode="bilinear", antialias=True)[:, 0]
    images = 2 * pixels[:, None] - 1
    return images.to(options.device), labels.to(options.device)


def run(options: argparse.Namespace) -> None:
    """Train and draw, or compare."""
    if options.size % options.patch:
        raise DemoError(f"--patch {options.patch}: {options.size} pixels are no multiple of it")
    torch.manual_seed(options.seed)
    images, labels = load(options)
    model = DiT(options.size, options.patch, options.dim, options.depth, options.heads)
    model.to(options.device)
    if options.compare:
        compare(model, images, labels, options)
        return
    start, cpu = time.perf_counter(), time.process_time()
    trained, errors = train(model, images, labels, options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{options.steps} steps: {seconds:.0f} s, {cpu:.0f} s of CPU time")
    print(f"squared error, mean of the first and last 50 steps: {mean(errors[:50]):.3f}, "
          f"{mean(errors[-50:]):.3f}")  # fmt: skip
    wanted = torch.arange(500, device=options.device) % 10
    noise = torch.randn(500, 1, options.size, options.size).to(options.device)
    drawn = {k: sample(trained, noise, wanted, k) for k in STEPS}
    for k, found in drawn.items():
        share = recognised(images, labels, found, wanted)
        print(f"{100 * share:.0f} % of 500 samples in {k} step{'s' * (k > 1)} are recognised")
    first = torch.cat([(labels == digit).nonzero()[:2] for digit in range(10)])
    real = images[first.view(10, 2).T.flatten()]
    rows = {f"{k} step{'s' * (k > 1)}": found[: 40 if k == 1 else 20] for k, found in drawn.items()}
    path = pictures.save(draw({**rows, "real": real}), options.out / "meanflow.png")
    print(f"picture: {path}")


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--data", choices=("mnist", "digits"), default="mnist", help="MNIST-5k, or scikit-learn's")
    add("--size", type=int, default=28, help="side of the images, pixels")
    add("--patch", type=int, default=7, help="side of a token, pixels")
    add("--dim", type=int, default=128, help="width of the tokens")
    add("--depth", type=int, default=4, help="number of blocks")
    add("--heads", type=int, default=4, help="number of attention heads")
    add("--steps", type=int, default=1600, help="of training")
    add("--batch", type=int, default=64, help="images in a step")
    add("--lr", type=float, default=1.5e-3, help="learning rate of AdamW at its peak")
    add("--share", type=float, default=0.25, help="of images with r < t, which need the jvp")
    add("--compare", action="store_true", help="time and memory of a step, fused and by MATH")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of weights, noise and the order of the images")
    add("--out", type=Path, default=Path("out"), help="folder for the picture")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    options = parser().parse_args(arguments)
    with flushed_subnormals(options.device):
        return running.run(run, options)


if __name__ == "__main__":
    sys.exit(main())
