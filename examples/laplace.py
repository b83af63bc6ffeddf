"""How sure a model is: linearized Laplace on digits, on digits turned, and on photographs.

    python examples/laplace.py --help

A linear head on a frozen ViT-S/14's features learns MNIST by `tangent_ops.statistics`. Generalised
cross-validation chooses l2; leave-one-out residuals give the noise's variance. The covariance of a
new image's outputs, given the data (`Ridge.covariance`; Immer, Korzepa, Bauer: "Improving
predictions of Bayesian neural nets via local linearization", AISTATS 2021), should be large for
digits turned by a quarter, and for patches of two photographs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import running
import torch
from assets import VIT_SMALL, default_cache, fetch
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

from tangent_ops import linearize, pictures, statistics
from tangent_ops.composition.ridge import Ridge
from tangent_ops.exact import feature_rows
from tangent_ops.losses import RescaledSquareLoss

SIDE = 28  # pixels of an image, before it is enlarged for the backbone
TARGET = RescaledSquareLoss().M  # of the right class's output; 0 of the others


@dataclass(frozen=True)
class Predictions:
    """What the model says about some images.

    Attributes:
        outputs: (M, C).
        covariance: (M, C, C), of the outputs, given the data.
        noise: variance of an output's noise.
    """

    outputs: Tensor
    covariance: Tensor
    noise: float

    def probabilities(self, *, certain: bool) -> Tensor:
        """(M, C): of each class, by the normal density of its targets; certain: noise alone."""
        targets = TARGET * torch.eye(self.outputs.shape[1], dtype=torch.float64)
        spread = self.noise * torch.eye(len(targets), dtype=torch.float64)
        spread = spread.expand_as(self.covariance) if certain else spread + self.covariance
        missed = targets - self.outputs[:, None]
        solved = torch.linalg.solve(spread, missed.mT).mT
        return (-(missed * solved).sum(2) / 2).softmax(1)


DOUBTS: dict[str, Callable[[Predictions], Tensor]] = {
    "deviation": lambda p: p.covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt(),
    "1 - confidence, noise only": lambda p: 1 - p.probabilities(certain=True).amax(1),
    "1 - confidence, covariance": lambda p: 1 - p.probabilities(certain=False).amax(1),
}  # (M,), of each image


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
    data = GreyImages(images, torch.zeros(len(images)).long(), resolve_model_data_config(backbone))
    batches = tqdm(DataLoader(data, 32), desc="features", unit="batch", disable=None)
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch, _ in batches])


class Head:
    """A linear head at its optimum for features (N, D) and classes.

    Attributes:
        l2: the penalty, by generalised cross-validation.
        noise: the noise's variance. A sample of leverage h has the residual e in the fit without
            it, of variance noise / (1 - h), and r = (1 - h) e in the fit with it: the mean of r e.
    """

    def __init__(self, data: TensorDataset) -> None:
        head = nn.Linear(data.tensors[0].shape[1], 10)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.tangent = linearize(head.eval())
        self.ridge = Ridge(statistics(self.tangent, data))
        self.l2 = self.ridge.choose().delta.l2
        rows, targets = feature_rows(self.tangent, data)  # the head says 0
        within = targets - self.ridge.predictions(rows, self.l2)
        without = self.ridge.leave_one_out(rows, targets, self.l2)
        self.noise = float((within * without).mean())

    def predict(self, inputs: Tensor) -> Predictions:
        """Outputs at the optimum, and their covariance given the data."""
        unknown = TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.long))
        rows, _ = feature_rows(self.tangent, unknown)
        covariance = self.ridge.covariance(rows, self.l2, self.noise)
        return Predictions(self.ridge.predictions(rows, self.l2), covariance, self.noise)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence|, in bins of the confidence."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    which = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [(right - confidence)[which == k].sum().abs() for k in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


@pictures.styled()
def draw(found: dict[str, Predictions]) -> Figure:
    """Deviations and confidences of each set of images."""
    figure = pictures.new_figure(height=3.6)
    left, right = figure.subplots(1, 2)
    left.set_xlabel("standard deviation of an output")
    right.set_xlabel("1 - probability of the likeliest digit, with covariance")
    look: dict[str, Any] = {"histtype": "step", "linewidth": 1.6, "label": list(found)}
    look["color"] = [pictures.BLUE, pictures.ORANGE, pictures.GREEN]
    for side, of in ((left, DOUBTS["deviation"]), (right, DOUBTS["1 - confidence, covariance"])):
        side.hist([of(each).numpy() for each in found.values()], 40, **look)
        side.grid(visible=False, axis="x")
        side.set_ylabel("images")
    left.legend()
    return figure


def run(options: argparse.Namespace) -> None:
    """Train, predict, print and draw."""
    pixels, labels = mnist(options.cache)
    some, others = stratified(labels, [options.images, options.scored], options.seed)
    kinds = (pixels[others], pixels[others].rot90(dims=(1, 2)),
             photographs(options.scored, options.seed))  # fmt: skip
    sizes = [options.images, *[options.scored] * 3]
    trained, *scored = features(torch.cat([pixels[some], *kinds]), options.cache).split(sizes)
    head = Head(TensorDataset(trained, labels[some]))
    known, turned, strange = map(head.predict, scored)
    found, truth = {"turned digits": turned, "photographs": strange}, labels[others]
    right = (known.outputs.argmax(1) == truth).double().mean()
    print(f"{len(truth)} digits, {100 * right:.1f} % recognised")
    print(f"l2 {head.l2:.2g}, standard deviation of the noise {head.noise**0.5:.2f}")
    for way, certain in (("noise only", True), ("covariance", False)):
        chances = known.probabilities(certain=certain)
        loss, error = F.nll_loss(chances.log(), truth), calibration_error(chances, truth)
        print(f"  {way:12} cross-entropy {loss:.3f}   calibration error {100 * error:.1f} %")
    is_other = torch.arange(2).repeat_interleave(len(truth))
    for name, other in found.items():
        print(f"{name} against digits, AUROC ({len(truth)} of each):")
        for measure, of in DOUBTS.items():
            area = roc_auc_score(is_other, torch.cat([of(known), of(other)]))
            print(f"  {measure:28} {area:.3f}")
    picture = draw({"digits": known, **found})
    print(f"picture: {pictures.save(picture, options.out / 'laplace.png')}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--images", type=int, default=1000, help="images of MNIST to train on")
    add("--scored", type=int, default=500, help="images of each kind to score")
    add("--seed", type=int, default=0, help="of the split and the patches")
    add("--out", type=Path, default=Path("out"), help="folder for the picture")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return the exit status."""
    return running.run(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
