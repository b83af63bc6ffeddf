"""The checks that a loss is a mean of convex losses of samples, against two batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import generator
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError
from tangent_ops.losses import Loss, MeanOfSamples, RescaledSquareLoss, check_convex, made_up

CLASSES = 5
WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0])
SORTED = torch.arange(CLASSES).repeat_interleave(6)  # as a folder of classes is read
LAST_UNKNOWN = SORTED.clone().index_fill(0, torch.tensor([28]), -100)
TEACHER = torch.randn(30, CLASSES, generator=generator(5))
PIXELS = SORTED[:, None, None].expand(-1, 2, 2)
ONE_UNKNOWN_PIXEL = PIXELS.clone()
ONE_UNKNOWN_PIXEL[25, 0, 0] = 255
KNOWN = F.one_hot(SORTED, CLASSES).float()
PARTLY_KNOWN = KNOWN.clone().index_fill(0, torch.tensor([9, 10]), -1.0)


def masked(logits: Tensor, targets: Tensor) -> Tensor:
    known = (targets >= 0).to(logits)
    return (known * (logits - targets).square()).sum() / known.sum().clamp_min(1)


def by_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Square loss, divided by the weights in the batch."""
    weights = WEIGHTS.to(logits)[targets]
    each = RescaledSquareLoss(reduction="none")(logits, targets)
    return (weights * each).sum() / weights.sum()


def centred(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits - logits.mean(0), targets)


def weighted(logits: Tensor, targets: Tensor) -> Tensor:
    """Weights that the batch does not divide by are a mean."""
    each = RescaledSquareLoss(reduction="none")(logits, targets)
    return (WEIGHTS.to(logits)[targets] * each).mean()


def taught(logits: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(logits, TEACHER.to(logits)[targets])


def taught_by_three(logits: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(logits, TEACHER[:3].to(logits)[targets])


def several(logits: Tensor, targets: Tensor) -> Tensor:
    assert bool(((targets == 0) | (targets == 1)).all())
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits))


def cross_entropy(**options) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        weight = options.get("weight")
        cast = {} if weight is None else {"weight": weight.to(logits)}
        return F.cross_entropy(logits, targets, **options | cast)

    return loss


# name -> loss, all targets, shape of a sample's logits
REFUSED = {
    "class weights": (cross_entropy(weight=WEIGHTS), SORTED, (CLASSES,)),
    "weights of squares": (by_class, SORTED, (CLASSES,)),
    "a class that is ignored": (cross_entropy(ignore_index=3), SORTED, (CLASSES,)),
    "a target that is ignored": (cross_entropy(), LAST_UNKNOWN, (CLASSES,)),
    "an ignored pixel": (cross_entropy(ignore_index=255), ONE_UNKNOWN_PIXEL, (CLASSES, 2, 2)),
    "outputs that are not known": (masked, PARTLY_KNOWN, (CLASSES,)),
    "a sum": (cross_entropy(reduction="sum"), SORTED, (CLASSES,)),
    "logits that are centred": (centred, SORTED, (CLASSES,)),
}
TAKEN = {
    "cross-entropy": (cross_entropy(), SORTED, (CLASSES,)),
    "smoothed": (cross_entropy(label_smoothing=0.1), SORTED, (CLASSES,)),
    "of probabilities": (cross_entropy(weight=WEIGHTS), KNOWN, (CLASSES,)),
    "of pixels": (cross_entropy(), PIXELS, (CLASSES, 2, 2)),
    "squares": (RescaledSquareLoss(), SORTED, (CLASSES,)),
    "weights that are not divided by": (weighted, SORTED, (CLASSES,)),
    "masked, all known": (masked, KNOWN, (CLASSES,)),
    "indices of a table": (taught, torch.arange(30), (CLASSES,)),
    "indices of a table of three": (taught_by_three, torch.arange(30) % 3, (CLASSES,)),
    "several classes at once": (several, KNOWN.long(), (CLASSES,)),
    "one output": (lambda z, y: F.mse_loss(z[:, 0], y.to(z)), SORTED, (1,)),
}


def objective(loss: Loss, logits: Tensor, targets: Tensor, batch: int) -> float:
    """Σ n_b loss_b / N, as a fit sums it."""
    batches = zip(logits.split(batch), targets.split(batch), strict=True)
    return sum(len(z) * float(loss(z, y)) for z, y in batches) / len(logits)


def tried(loss: Loss, targets: Tensor, shape: tuple[int, ...], logits: Callable) -> None:
    """Checks four samples first, then batch after batch, as the data come."""
    check = MeanOfSamples(loss, logits(4, *shape), targets[:4])
    for some in targets.split(7):
        check.check(some)


@pytest.mark.parametrize("logits", [torch.zeros, torch.ones])
@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_mixes_samples_is_refused_whatever_comes_first(name, logits):
    """Neither the zero logits of a new head nor samples of one class reveal that it mixes."""
    loss, targets, shape = REFUSED[name]
    some = torch.randn(30, *shape, dtype=torch.float64, generator=generator(1))
    one, other = (objective(loss, some, targets, batch) for batch in (4, 9))
    assert not abs(one - other) <= 1e-6 * abs(one)  # also if one is NaN: it is no mean
    with pytest.raises(ArgumentError, match="mean of the samples' own losses"):
        tried(loss, targets, shape, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TAKEN)
def test_a_mean_of_the_samples_losses_is_taken(name, dtype):
    loss, targets, shape = TAKEN[name]
    some = torch.randn(30, *shape, dtype=torch.float64, generator=generator(1))
    one, other = (objective(loss, some, targets, batch) for batch in (4, 9))
    assert math.isclose(one, other, rel_tol=1e-12)
    tried(loss, targets, shape, lambda *size: torch.zeros(*size, dtype=dtype))


def test_no_class_is_left_out():
    """One weight of a thousand, wherever it is."""
    for odd in (0, 1, 500, 999):
        weight = torch.ones(1000).index_fill(0, torch.tensor([odd]), 2.0)
        with pytest.raises(ArgumentError, match="mean of the samples' own losses"):
            MeanOfSamples(nn.CrossEntropyLoss(weight), torch.zeros(4, 1000), torch.full((4,), 7))


def test_more_classes_than_are_tried_at_once_are_tried_as_they_come():
    weight = torch.ones(1500).index_fill(0, torch.tensor([1400]), 2.0)
    check = MeanOfSamples(nn.CrossEntropyLoss(weight), torch.zeros(4, 1500), torch.zeros(4).long())
    check.check(torch.tensor([5, 1300]))
    with pytest.raises(ArgumentError, match="mean of the samples' own losses"):
        check.check(torch.tensor([5, 1400]))


def test_one_sample_that_curves_down_is_not_hidden_by_others():
    signs = torch.tensor([1.0, 1.0, 1.0, -0.1, 1.0])

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        each = RescaledSquareLoss(reduction="none")(logits, targets)
        return (signs[targets] * each).mean()

    logits = made_up(torch.zeros(1, CLASSES), CLASSES)
    check_convex(RescaledSquareLoss(), logits, torch.arange(CLASSES))
    with pytest.raises(ArgumentError, match="must be convex"):
        check_convex(loss, logits, torch.arange(CLASSES))


def test_cross_entropy_is_convex_where_it_saturates():
    """Terms of the curvature cancel there; rounding must not count as negative curvature."""
    for scale in (1.0, 10.0, 100.0):
        logits = scale * torch.randn(64, CLASSES, generator=generator(2))
        check_convex(F.cross_entropy, logits, torch.arange(64) % CLASSES)
