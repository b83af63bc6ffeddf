"""Fine-tune the last block of a real ViT on private images, and say what that tells of each image.

    python examples/private_demo.py --epsilon 3

The head of the anchor is a linear probe of public images; the private ones are seen by
`fit_private` alone: their losses are not shown, nor is anything chosen by them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from assets import VIT_SMALL, DemoError, default_cache, fetch
from backbone import load_backbone
from images import load_images
from private import SIZES, prepare, train_tangent
from rich.console import Console
from rich.markup import escape
from timm.data.config import resolve_model_data_config

from tangent_ops import accuracy, save_delta
from tangent_ops.errors import TangentOpsError

console = Console()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a pre-trained ViT with differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epsilon", type=float, default=3.0, help="the privacy to keep, at delta = 1e-5")
    add("--mode", default="bookkeeping", help="bookkeeping, ghost or per-sample")
    add("--secure", action="store_true", help="sampling and noise from the operating system")
    add("--data", default="mnist", help="mnist, digits, or a folder with a sub-folder per class")
    add("--seed", type=int, default=0, help="of the split; the noise has none that anybody knows")
    add("--out", type=Path, default=Path("out"), help="folder for the delta")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    add("--quick", action="store_true", help="few images and steps: to see that it runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    options = parse(arguments)
    sizes = (100, 100, 60, 200) if options.quick else SIZES
    training = {"mode": options.mode, "secure_mode": options.secure}
    if options.quick:
        training |= {"expected_batch_size": 40, "steps": 4}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        model = load_backbone(fetch(VIT_SMALL, options.cache))
        images = load_images(options.data, resolve_model_data_config(model), options.cache)
        console.print(f"[bold]{images.name}: {sizes[2]} public images, {sizes[3]} private[/bold]")
        prepared = prepare(model, images, options.seed, sizes=sizes)
        before = accuracy(prepared.tail, prepared.scored)
        after, fitted = train_tangent(prepared, options.epsilon, None, **training)
    except (DemoError, TangentOpsError) as error:
        Console(stderr=True).print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False
        )
        return 2
    path = options.out / "private.safetensors"
    save_delta(fitted.delta, path)
    console.print(
        f"\nAccuracy on {sizes[0]} public test images: {before:.1%} of the public probe, "
        f"{after:.1%} with the private images, in {fitted.seconds:.0f} s\n"
    )
    console.print(str(fitted.statement), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n  wrote {path}; [bold]tangent-ops privacy {path}[/bold] says all that again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
