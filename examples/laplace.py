"""How sure a model is: linearized Laplace on digits it was trained on, and on photographs.

    python examples/laplace.py --help

A small ViT is trained on scikit-learn's digits, and linearized in its last norm and head. Given the
data, the logits of a new image have a covariance (`predictive_covariance`; Immer, Korzepa, Bauer:
"Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021). It should be
large where the model has seen nothing alike: on patches of two photographs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from assets import DemoError
from images import digits, stratified
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tangent_ops import fit, fit_exact, last_blocks, linearize
from tangent_ops.exact import Problem, predictive_covariance

SIDE = 8  # pixels of an image
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


@dataclass(frozen=True)
class Predictions:
    """What the model says about some images.

    Attributes:
        logits: (M, C).
        covariance: (M, C, C), of the logits.
    """

    logits: Tensor
    covariance: Tensor

    @property
    def deviations(self) -> Tensor:
        """(M,): the root of the logits' mean variance."""
        return self.covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt()

    @property
    def plain(self) -> Tensor:
        """(M, C): the softmax of the logits, as if they were certain."""
        return self.logits.softmax(1)

    def averaged(self, draws: int = 2000, seed: int = 0) -> Tensor:
        """(M, C): the mean of the softmax over normal logits with that covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(*root.shape[:2], draws, generator=generator, dtype=root.dtype)
        return (self.logits[:, :, None] + root @ noise).softmax(1).mean(2)


def photographs(count: int, seed: int) -> Tensor:
    """Grey patches of scikit-learn's two photographs, (count, 1, SIDE, SIDE), from 0 to 1."""
    bunch: Any = load_sample_images()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        photo = torch.tensor(bunch.images[number % 2]).float().mean(2) / 255
        top, left = (
            int(torch.randint(extent - 8 * SIDE, (), generator=generator)) for extent in photo.shape
        )
        found.append(F.avg_pool2d(photo[None, top : top + 8 * SIDE, left : left + 8 * SIDE], 8))
    return torch.stack(found)


def trained_vit(data: TensorDataset, epochs: int, seed: int) -> VisionTransformer:
    """A small ViT, trained by AdamW on all its parameters."""
    torch.manual_seed(seed)
    vit = VisionTransformer(
        img_size=SIDE, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    fit(vit, data, loss=F.cross_entropy, epochs=epochs, lr=2e-3, batch_size=64, seed=seed)
    return vit.eval()


def posterior(vit: VisionTransformer, data: TensorDataset, l2: float, blocks: int = 1) -> Problem:
    """The linearization of the last blocks, norm and head, at the optimum for the data."""
    tangent = linearize(vit, last_blocks(vit, blocks))
    # Rows of J are small here: products with them are faster than passes.
    problem = Problem(tangent, data, l2, loss=F.cross_entropy, representation="rows")
    fit_exact(problem, tol=1e-2)
    return problem


def predict(problem: Problem, images: Tensor) -> Predictions:
    """Logits at the optimum, and their covariance given the data."""
    with torch.no_grad():
        logits = problem.tangent(images).double()
    return Predictions(logits, predictive_covariance(problem, images, tol=1e-2))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence|, in bins of the confidence."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    which = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [(right - confidence)[which == k].sum().abs() for k in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


def draw(known: Predictions, others: Predictions, area: float) -> Figure:
    """Deviations and confidences, of digits and of photographs."""
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.8), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2)
        top = float(torch.cat((known.deviations, others.deviations)).max())
        for side, of, edges in (
            (left, lambda p: p.deviations, torch.linspace(0, top, 31)),
            (right, lambda p: p.averaged().max(1).values, torch.linspace(0, 1, 31)),
        ):
            for name, found, colour in (("digits", known, BLUE), ("photographs", others, ORANGE)):
                side.hist(of(found).numpy(), edges.tolist(), color=colour, alpha=0.6, label=name)
            side.set_ylabel("images")
            side.legend(frameon=False)
        left.set_xlabel("standard deviation of a logit")
        left.set_title(f"Photographs are less sure (AUROC {area:.2f})", loc="left", weight="bold")
        right.set_xlabel("probability of the likeliest digit")
        right.set_title("With the covariance", loc="left", weight="bold")
    return figure


def run(options: argparse.Namespace) -> tuple[Problem, Predictions, Predictions]:
    """Train, fit, predict, print and draw."""
    pixels, labels = digits()
    parts = stratified(labels, [options.images, options.scored], options.seed)
    images = 2 * pixels[:, None] - 1
    data, scored = TensorDataset(images[parts[0]], labels[parts[0]]), images[parts[1]]
    vit = trained_vit(data, options.epochs, options.seed)
    problem = posterior(vit, data, options.l2, options.blocks)
    known = predict(problem, scored)
    others = predict(problem, 2 * photographs(options.scored, options.seed) - 1)
    truth = labels[parts[1]]
    print(f"{len(truth)} digits, {100 * (known.plain.argmax(1) == truth).double().mean():.1f} % "
          f"recognised")  # fmt: skip
    for name, found in (("certain logits", known.plain), ("with covariance", known.averaged())):
        loss = float(F.nll_loss(found.log(), truth))
        error = calibration_error(found, truth)
        print(f"  {name:16} cross-entropy {loss:.3f}   calibration error {100 * error:.1f} %")
    strange = torch.cat((torch.zeros(len(truth)), torch.ones(len(others.logits))))
    areas = {
        "deviation": torch.cat((known.deviations, others.deviations)),
        "1 - confidence": 1 - torch.cat((known.plain, others.plain)).max(1).values,
        "1 - confidence, with covariance": 1
        - torch.cat((known.averaged(), others.averaged())).max(1).values,
    }
    print(f"photographs against digits, AUROC ({len(others.logits)} of each):")
    for name, score in areas.items():
        print(f"  {name:32} {roc_auc_score(strange, score):.3f}")
    path = options.out / "laplace.png"
    draw(known, others, float(roc_auc_score(strange, areas["deviation"]))).savefig(path)
    print(f"picture: {path}")
    return problem, known, others


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--images", type=int, default=500, help="digits to train on")
    add("--scored", type=int, default=60, help="other digits, and patches of photographs")
    add("--epochs", type=int, default=60, help="of the ViT's training")
    add("--blocks", type=int, default=0, help="last blocks to linearize, too; slower")
    add("--l2", type=float, default=1e-3, help="the penalty: a prior of variance 1 / (images l2)")
    add("--seed", type=int, default=0, help="of weights, order and split")
    add("--out", type=Path, default=Path("out"), help="folder for the picture")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    options = parser().parse_args(arguments)
    matplotlib.use("Agg")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch's own
            run(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
