"""Modules around trees, and their linearization: this library's, and by torch.func.jvp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tangent_ops import linearize
from tests.fuzz.nodes import Env, Node, pattern, repeated, run
from tests.fuzz.ops import SHAPE


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        like = torch.empty((), dtype=torch.float64)
        self.scale = nn.Parameter(1.0 + 0.2 * pattern(SHAPE[-1:], like, 1.0))
        self.shift = nn.Parameter(0.2 * pattern(SHAPE[-1:], like, 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Layer(nn.Module):
    """A tree behind parameters; a checkpoint at its root is around them, and its input plain."""

    def __init__(self, node: Node, env: Env) -> None:
        super().__init__()
        self.affine = Affine()
        self.node, self.env = node, env

    def forward(self, x: Tensor) -> Tensor:
        if self.node.kind != "checkpoint":
            return run(self.node, self.env, self.affine(x))
        (child,) = self.node.children
        within = lambda x: run(child, self.env, self.affine(x))  # noqa: E731
        return repeated(self.env, within, x, **dict(self.node.options))


def make_model(env: Env, dtype: torch.dtype, *trees: Node) -> nn.Module:
    """A layer for each tree; this library's linearized model in "ours"."""
    model = nn.Sequential(*(Layer(tree, env) for tree in trees)).to(dtype)
    if env.mode != "ours":
        return model
    tangent = linearize(model)
    tangent.load_delta_dict(deltas(model))
    return tangent


def make_models(env: Env, dtype: torch.dtype, root: Node) -> None:
    """Those that the tree calls, innermost first."""
    for node in reversed(list(root.nodes())):
        if node.kind == "linearize":
            model = make_model(env, dtype, *node.children)
            env.models[node] = model if env.mode == "ours" else functools.partial(_sum, model)


def _sum(model: nn.Module, x: Tensor) -> Tensor:
    y, y_t = pushed_forward(model, x, deltas(model))
    return y + y_t


def deltas(model: nn.Module) -> dict[str, Tensor]:
    named = enumerate(model.named_parameters())
    return {name: pattern(p.shape, p, 3.0 + i) for i, (name, p) in named}


def pushed_forward(model: Any, x: Tensor, directions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """f(x; w) and J(x) Δw by torch.func.jvp.

    What a model computes under no_grad is a constant to its J: so it is to ordinary training.
    """
    env = model[0].env
    before, env.no_grad_is_constant = env.no_grad_is_constant, env.exact
    try:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        call = functools.partial(functional_call, model)
        return torch.func.jvp(lambda w: call(w, (x,)), (weights,), (directions,))
    finally:
        env.no_grad_is_constant = before
