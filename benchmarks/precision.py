"""How far value, tangent and gradient are from float64, in every precision a model can run in.

python -m benchmarks.precision --out benchmarks/results/precision/cpu.json
python -m benchmarks.publish            # writes the table in docs/precision.md
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.precision_table import Errors, precision_table
from benchmarks.record import environment, write_json
from benchmarks.suite.vits import Weights, random_batch, random_vit, torch_jvp
from tangent_ops import linearize

MODEL = "vit_tiny_patch16_224"
IMAGES = 4
SEED = 0


@dataclass(frozen=True)
class Precision:
    """The anchor's dtype, and autocast's if it is on. Deltas are float32."""

    name: str
    anchor: torch.dtype
    autocast: torch.dtype | None = None

    def context(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.autocast)


PRECISIONS = (
    Precision("float32", torch.float32),
    Precision("float32, bfloat16 autocast", torch.float32, torch.bfloat16),
    Precision("bfloat16 anchor, float32 delta", torch.bfloat16),
    Precision("float32, float16 autocast", torch.float32, torch.float16),
    Precision("float16 anchor, float32 delta", torch.float16),
)


@dataclass(frozen=True)
class Problem:
    """A model, Δw of all its parameters, images, and a cotangent of the outputs."""

    model: nn.Module
    delta: Weights
    images: Tensor
    cotangent: Tensor


def problem(name: str = MODEL, images: int = IMAGES) -> Problem:
    """Random weights; all else normal, Δw of deviation 0.01."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = random_vit(name)
        delta = {n: 0.01 * torch.randn_like(p) for n, p in model.named_parameters()}
        inputs, _ = random_batch(model, images)
        return Problem(model, delta, inputs, torch.randn(images, model.num_classes))


def errors(given: Problem, precision: Precision) -> Errors:
    """Relative errors, of the anchor and the images as they are in that precision."""
    model = copy.deepcopy(given.model).to(precision.anchor)
    images = given.images.to(precision.anchor)
    exact_model = copy.deepcopy(model).double()
    delta = {name: d.double() for name, d in given.delta.items()}
    exact_value, exact_tangent = torch_jvp(exact_model, images.double(), delta)
    _, exact_gradient = _plain(exact_model, images.double(), given.cotangent)

    tangent = linearize(model)
    tangent.load_delta_dict(given.delta)
    with precision.context():
        value, value_t = tangent.primal_and_tangent(images)
        cast = {n: d.to(precision.anchor) for n, d in given.delta.items()}
        _, eager_t = torch_jvp(model, images, cast)
        plain_value, plain_gradient = _plain(model, images, given.cotangent)
    gradient = _gradient(value_t, tangent.deltas(), given.cotangent)
    return Errors(
        precision=precision.name,
        value=_error(value, exact_value),
        plain_value=_error(plain_value, exact_value),
        tangent=_error(value_t, exact_tangent),
        eager_tangent=_error(eager_t, exact_tangent),
        gradient=_error(gradient, exact_gradient),
        plain_gradient=_error(plain_gradient, exact_gradient),
    )


def _plain(model: nn.Module, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary model's output, and its gradient by the weights."""
    model = copy.deepcopy(model).requires_grad_(True)
    with torch.enable_grad():
        output = model(images)
    with torch.autocast("cpu", enabled=False):
        return output, _gradient(output, dict(model.named_parameters()), cotangent)


def _gradient(output: Tensor, weights: Mapping[str, Tensor], cotangent: Tensor) -> Tensor:
    """All gradients, one after the other, in float64."""
    grads = torch.autograd.grad(output, list(weights.values()), cotangent.to(output.dtype))
    return torch.cat([grad.double().flatten() for grad in grads])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/precision.json"), metavar="FILE")
    out = parser.parse_args().out
    given = problem()
    rows = [errors(given, precision) for precision in PRECISIONS]
    setting = f"{MODEL}, random weights, {IMAGES} images, every parameter trained"
    content = {"environment": environment(), "setting": setting, "rows": [*map(asdict, rows)]}
    write_json(out, content)
    print(precision_table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
