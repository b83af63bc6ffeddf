"""Fine-tune the last block of a real ViT on private images with differential privacy.

    python examples/private_demo.py --epsilon 3

The head of the anchor is a linear probe of public images. Only `fit_private` sees the private ones:
their losses are not shown, and nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common import LOSS, console, deal, load, parser_of, prepare
from running import run

from tangent_ops import accuracy, save_delta
from tangent_ops.privacy import Privacy, fit_private

# Chosen on the validation images of seed 0, which are public here, at ε = 3, from the rates 1e-4,
# 3e-4, 1e-3 and 2e-3 of AdamW; the test images had no say.
LR = 1e-3
EXPECTED, STEPS = 250, 20
QUICK = 40, 4


def demo(options: argparse.Namespace) -> None:
    """Run the demo; write ``private.safetensors`` to the output folder."""
    model, images = load(options)
    prepared = prepare(model, deal(images, options), options.seed)
    tail, scored, private = prepared.tail, prepared.scored.tokens, prepared.shards[0].tokens
    console.print(f"\n{len(prepared.public)} public images, {len(private)} private ones")
    before = accuracy(tail, scored)
    expected, steps = QUICK if options.quick else (EXPECTED, STEPS)
    privacy = Privacy(
        target_epsilon=options.epsilon,
        delta=1e-5,
        max_grad_norm=1.0,
        secure_mode=options.secure,
        expected_batch_size=expected,
        steps=steps,
    )
    fitted = fit_private(tail, private, privacy, loss=LOSS, lr=LR, mode=options.mode)
    path = options.out / "private.safetensors"
    save_delta(fitted.delta, path)
    console.print(
        f"\nAccuracy on {len(prepared.scored)} public {options.score_on} images: {before:.1%} of "
        f"the public probe, {accuracy(tail, scored):.1%} with the private images, in "
        f"{fitted.seconds:.0f} s\n"
    )
    console.print(str(fitted.statement), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\n  wrote {path}; [bold]tangent-ops privacy {path}[/bold] prints the statement again"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return the exit status."""
    parser = parser_of("Fine-tune a pre-trained ViT with differential privacy.", private=2000)
    add = parser.add_argument
    add("--epsilon", type=float, default=3.0, help="the privacy to keep, at delta = 1e-5")
    add("--mode", default="bookkeeping", help="bookkeeping, ghost or per-sample")
    add("--secure", action="store_true", help="sampling and noise from the operating system")
    return run(demo, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
