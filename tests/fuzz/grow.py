"""How a random program grows from a number."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from random import Random

import torch

from tests.fuzz.nodes import Node, case
from tests.fuzz.ops import OPS


@dataclass(frozen=True)
class Program:
    """The number that it grew from, its precision, what is asked of the tree, and the tree."""

    seed: int
    dtype: torch.dtype
    end: str
    root: Node

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"seed {self.seed}, {dtype}, {self.end} of {self.root!r}"

    @property
    def kinds(self) -> set[str]:
        return {node.kind for node in self.root.nodes()}

    @property
    def changes_in_place(self) -> bool:
        return any(
            n.kind == "in_place" or ("inplace", True) in n.options for n in self.root.nodes()
        )


# How often a node or end is drawn, and how many derivatives of the three allowed it takes.
NODES = {
    "seq": (16, 0),
    "jvp": (6, 1),
    "dual_level": (4, 1),
    "torch_linearize": (6, 1),
    "linearize": (3, 1),
    "vjp": (4, 1),
    "grad": (5, 1),
    "vmap": (5, 0),
    "jacfwd": (2, 1),
    "jacrev": (2, 1),
    "hessian": (2, 2),
    "checkpoint": (3, 0),
    "no_grad": (2, 0),
    "detach": (2, 0),
    "in_place": (4, 0),
    "view": (4, 0),
    "autocast": (12, 0),  # of float32, in programs that may
}
ENDS = {
    "value": (3, 0),
    "gradient": (3, 1),
    "gradient_twice": (2, 2),
    "gradient_by_tangent": (6, 1),
    "gradient_by_tangent_and_input": (3, 2),
    "gradient_in_level": (2, 2),
    "training": (6, 1),
    "training_with_blocks_checkpointed": (2, 1),
    "training_and_gradient": (3, 2),
}
CHOICES = {
    "live": (False, True),
    "in_dim": (0, 1, 2, 3),
    "out_dim": (0, 1, 2, 3),
    "reentrant": (False, False, True),
}
HOW = {"in_place": ("all", "add", "half"), "view": ("transposed", "strided", "expanded", "part")}
TAKES = {
    **dict.fromkeys(("jvp", "dual_level", "torch_linearize", "vjp"), ("live",)),
    "vmap": ("in_dim", "out_dim"),
    "checkpoint": ("reentrant",),
}


FORWARD = {"jvp", "torch_linearize", "linearize", "jacfwd", "hessian", "dual_level"}
REVERSE = {"vjp", "grad", "jacrev", "hessian"}
LEVELS = {"dual_level", *ENDS} - {"value", "gradient", "gradient_twice"}
# What PyTorch refuses, a node inside others or of an end; one program in 20 tries it all the same.
REFUSED: dict[str, set[str]] = {
    **dict.fromkeys(FORWARD, LEVELS | {"torch_linearize"}),
    "dual_level": FORWARD | LEVELS | {"vmap"},
    "checkpoint": REVERSE | {"vmap"},
    "recurrent": {"vmap", "jacfwd", "jacrev", "hessian"},
}
# What PyTorch gets wrong, plain operations too: to torch.func.linearize a jacrev is a constant, and
# what it returns is one to everything around it.
WRONG: dict[str, set[str]] = {
    "torch_linearize": FORWARD | REVERSE | {*ENDS} - {"value"},
    "jacrev": {"torch_linearize"},
    "hessian": {"torch_linearize"},
}
REENTRANT_REFUSED = FORWARD | {end for end in ENDS if end.startswith("gradient_")}


PRECISIONS = [(torch.float64,)] * 8 + [(torch.float32,)] + [(torch.float32, "may cast")] * 3
OFTEN = {"attention": 3, "multi_head_attention": 2, "layer_norm": 2}


def grow(seed: int) -> Program:
    """The program of this number."""
    draw = Random(seed)
    end = draw.choices(list(ENDS), [weight for weight, _ in ENDS.values()])[0]
    dtype, *rules = draw.choice(PRECISIONS)
    if draw.random() < 0.05:
        rules.append("careless")
    root = _tree(draw, draw.randint(2, 8), 3 - ENDS[end][1], {end, *rules})
    return Program(seed, dtype, end, root)


def _tree(draw: Random, size: int, orders: int, around: Set[str]) -> Node:
    """``around``: kinds of the nodes around this one, the end, and what is special here."""
    if size <= 1:
        return _op(draw, around)
    fitting = [kind for kind, (_, order) in NODES.items() if order <= orders and _may(kind, around)]
    kind = draw.choices(fitting, [NODES[name][0] for name in fitting])[0]
    orders -= NODES[kind][1]
    inside = around | {kind}
    if kind == "seq":
        first = draw.randint(1, size - 1)
        sizes = (first, size - first)
        return Node(kind, (), tuple(_tree(draw, each, orders, inside) for each in sizes))
    options = {name: draw.choice(CHOICES[name]) for name in TAKES.get(kind, ())}
    if kind in HOW:
        options["how"] = draw.choice(HOW[kind])
    if kind == "checkpoint" and around & REENTRANT_REFUSED:
        options["reentrant"] = False
    # In place: what an op returned, as a view may be the input itself.
    child = _op(draw, inside) if kind == "in_place" else _tree(draw, size - 1, orders, inside)
    return Node(kind, tuple(options.items()), (child,))


def _may(kind: str, around: Set[str]) -> bool:
    if around & WRONG.get(kind, set()):
        return False
    if kind == "autocast":
        return "may cast" in around
    return "careless" in around or not around & REFUSED.get(kind, set())


def _op(draw: Random, around: Set[str]) -> Node:
    fitting = [name for name in OPS if _may(name, around)]
    name = draw.choices(fitting, [OFTEN.get(name, 1) for name in fitting])[0]
    options = tuple((key, draw.choice(values)) for key, values in OPS[name][1].items())
    count = 1 + len(case(Node(name, options)).shapes)
    live = tuple(draw.random() < 0.7 for _ in range(count))
    return Node(name, (*options, ("live", live if any(live) else (True,) * count)))
