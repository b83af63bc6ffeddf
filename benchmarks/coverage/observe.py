"""What a model is made of, seen while it runs: fused operations, and its attention."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tangent_ops.ops import forward_ad
from tangent_ops.ops.backend import may_be_dual

# As `fused_forward_ad` routes them, under the names of the page.
ROUTED = {
    function: function.__name__
    for function in (
        torch.nn.functional.linear,
        torch.nn.functional.layer_norm,
        torch.nn.functional.gelu,
        *forward_ad._CONVOLUTIONS,
        *forward_ad._COMPOSED,
        *forward_ad._RECURRENT,
    )
} | {function: "attention" for function in forward_ad._ATTENTION}
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}


class Seen:
    """Counts of a linearized model's calls with tangents."""

    def __init__(self):
        self.fused: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self._weights: set[torch.Size] = set()

    def call(self, func, args: tuple, kwargs: dict) -> None:
        if not any(may_be_dual(x) for x in tree_leaves((args, kwargs))):
            return
        name = getattr(func, "__name__", "")
        if func in ROUTED:
            self.fused[ROUTED[func]] += 1
        if name == "scaled_dot_product_attention":
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.attention[_attention(bias)] += 1
        elif name == "multi_head_attention_forward":
            self.attention["nn.MultiheadAttention"] += 1
        elif name == "softmax":
            self._weights.add(args[0].shape)
        elif name in PRODUCTS:
            self._product([x for x in tree_leaves(args) if isinstance(x, Tensor)])

    def _product(self, operands: list[Tensor]) -> None:
        if operands[0].shape in self._weights:
            self.attention["softmax by hand"] += 1
        elif all(x.ndim > 2 and may_be_dual(x) for x in operands):
            self.attention["products by hand"] += 1

    def kind(self) -> str:
        """Of attention, in few words."""
        kinds = dict(self.attention)
        if len(kinds) > 1:  # the scores of what is counted already, or a lesser product
            kinds.pop("products by hand", None)
        return ", ".join(sorted(kinds)) or "none"


def _attention(bias: Tensor | None) -> str:
    if bias is None:
        return "sdpa"
    return "sdpa, trained bias" if may_be_dual(bias) else "sdpa, mask"


@contextlib.contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Has `seen` told what linearized models call inside."""
    original = forward_ad.fused_forward_ad.__torch_function__

    def handle(mode, func, types, args=(), kwargs=None):
        seen.call(func, args, kwargs or {})
        return original(mode, func, types, args, kwargs)

    with mock.patch.object(forward_ad.fused_forward_ad, "__torch_function__", handle):
        yield


PARTS = {  # in names of parameters
    "class token": ("cls_token", "class_token"),
    "distillation token": ("dist_token", "distillation_token"),
    "register tokens": ("reg_token", "register_token"),
    "packed qkv": ("qkv.", "in_proj_weight"),
    "separate qkv": ("q_proj.", ".q.", "query.", "to_q."),
    "relative positions": ("relative_position", "rel_pos", "attention_biases", "rel_height"),
    "qk norm": ("q_norm", "norm_q"),
    "layer scale": ("ls1", "gamma1", "gamma_1", "layer_scale", "lambda_1"),
}


def parts(model: nn.Module) -> list[str]:
    """Words for what it has, from the names of its parameters and modules."""
    names = [name for name, _ in model.named_parameters()]
    found = [word for word, marks in PARTS.items() if any(m in n for m in marks for n in names)]
    modules = list(model.modules())
    kinds = {type(module).__name__.lower() for module in modules}
    if any(word in kind for word in ("window", "partition", "maskunit") for kind in kinds):
        found.append("windows")
    if any("rotary" in kind or "rope" in kind for kind in kinds):
        found.append("rotary")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        found.append("batch norm")
    return found
