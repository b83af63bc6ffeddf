"""How sure a model is: linearized Laplace on digits it was trained on, and on photographs.

    python examples/laplace.py --help

A linear head is fitted to what a frozen backbone, a ViT-S/14, says about some images of MNIST, and
linearized. Given the data, the logits of a new image have a covariance (`predictive_covariance`;
Immer, Korzepa, Bauer: "Improving predictions of Bayesian neural nets via local linearization",
AISTATS 2021). It should be large where the model has seen nothing alike: on patches of two
photographs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from assets import VIT_SMALL, DemoError, default_cache, fetch
from backbone import load_backbone
from images import GreyImages, mnist, stratified
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from tangent_ops import fit_exact, linearize, pictures
from tangent_ops.exact import Problem, predictive_covariance

SIDE = 28  # pixels of an image, before it is enlarged for the backbone


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
    """Grey patches of scikit-learn's two photographs, (count, SIDE, SIDE), from 0 to 1."""
    bunch: Any = load_sample_images()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        photo = torch.tensor(bunch.images[number % 2]).float().mean(2) / 255
        top, left = (
            int(torch.randint(extent - 4 * SIDE, (), generator=generator)) for extent in photo.shape
        )
        found.append(F.avg_pool2d(photo[None, top : top + 4 * SIDE, left : left + 4 * SIDE], 4)[0])
    return torch.stack(found)


def features(images: Tensor, cache: Path) -> Tensor:
    """What the backbone says about grey images (N, SIDE, SIDE): (N, 384)."""
    backbone: Any = load_backbone(fetch(VIT_SMALL, cache))
    unknown = torch.zeros(len(images), dtype=torch.long)
    data = GreyImages(images, unknown, resolve_model_data_config(backbone))
    batches = tqdm(DataLoader(data, 32), desc="features", unit="batch", disable=None)
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch, _ in batches])


def posterior(data: TensorDataset, l2: float) -> Problem:
    """A head of zeros for features (N, D), linearized, at the optimum for the data."""
    head = nn.Linear(data.tensors[0].shape[1], 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    problem = Problem(linearize(head.eval()), data, l2, loss=F.cross_entropy, representation="rows")
    fit_exact(problem, tol=1e-2)
    return problem


def predict(problem: Problem, inputs: Tensor) -> Predictions:
    """Logits at the optimum, and their covariance given the data."""
    with torch.no_grad():
        logits = problem.tangent(inputs).double()
    return Predictions(logits, predictive_covariance(problem, inputs, tol=1e-2))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence|, in bins of the confidence."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    which = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [(right - confidence)[which == k].sum().abs() for k in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


@pictures.styled()
def draw(known: Predictions, others: Predictions, area: float) -> Figure:
    """Deviations and confidences, of digits and of photographs."""
    figure = pictures.new_figure(height=3.6)
    left, right = figure.subplots(1, 2)
    top = float(torch.cat((known.deviations, others.deviations)).max())
    for side, of, edges in (
        (left, lambda p: p.deviations, torch.linspace(0, top, 25)),
        (right, lambda p: p.averaged().max(1).values, torch.linspace(0, 1, 26)),
    ):
        for name, found, colour, hatch in (
            ("digits", known, pictures.BLUE, None),
            ("photographs", others, pictures.ORANGE, "///"),
        ):
            look: dict[str, Any] = {"color": colour, "alpha": 0.6, "hatch": hatch, "label": name}
            side.hist(of(found).numpy(), edges.tolist(), edgecolor="white", **look)
        side.grid(visible=False, axis="x")
        side.set_ylabel("images")
    left.legend()
    left.set_xlabel("standard deviation of a logit")
    left.set_title(f"AUROC {area:.3f}")
    right.set_xlabel("probability of the likeliest digit")
    right.set_title("Averaged over the logits' distribution")
    return figure


def run(options: argparse.Namespace) -> tuple[Problem, Predictions, Predictions]:
    """Train, fit, predict, print and draw."""
    pixels, labels = mnist(options.cache)
    parts = stratified(labels, [options.images, options.scored], options.seed)
    sizes = [options.images, options.scored, options.scored]
    strange = photographs(options.scored, options.seed)
    images = torch.cat([*(pixels[part] for part in parts), strange])
    trained, scored, other = features(images, options.cache).split(sizes)
    problem = posterior(TensorDataset(trained, labels[parts[0]]), options.l2)
    known = predict(problem, scored)
    others = predict(problem, other)
    truth = labels[parts[1]]
    print(f"{len(truth)} digits, {100 * (known.plain.argmax(1) == truth).double().mean():.1f} % "
          f"recognised")  # fmt: skip
    for name, found in (("certain logits", known.plain), ("with covariance", known.averaged())):
        loss = float(F.nll_loss(found.log(), truth))
        error = calibration_error(found, truth)
        print(f"  {name:16} cross-entropy {loss:.3f}   calibration error {100 * error:.1f} %")
    is_other = torch.cat((torch.zeros(len(truth)), torch.ones(len(others.logits))))
    areas = {
        "deviation": torch.cat((known.deviations, others.deviations)),
        "1 - confidence": 1 - torch.cat((known.plain, others.plain)).max(1).values,
        "1 - confidence, with covariance": 1
        - torch.cat((known.averaged(), others.averaged())).max(1).values,
    }
    print(f"photographs against digits, AUROC ({len(others.logits)} of each):")
    for name, score in areas.items():
        print(f"  {name:32} {roc_auc_score(is_other, score):.3f}")
    figure = draw(known, others, float(roc_auc_score(is_other, areas["deviation"])))
    path = pictures.save(figure, options.out / "laplace.png")
    print(f"picture: {path}")
    return problem, known, others


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--images", type=int, default=400, help="images of MNIST to train on")
    add("--scored", type=int, default=50, help="other images, and patches of photographs")
    add("--l2", type=float, default=3e-2, help="the penalty: a prior of variance 1 / (images l2)")
    add("--seed", type=int, default=0, help="of the split and the patches")
    add("--out", type=Path, default=Path("out"), help="folder for the picture")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    options = parser().parse_args(arguments)
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
