"""Sample calls of the attention kernels, as launches not yet run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from tangent_kernels._launch import Config, Launch
from tangent_kernels.attention import Call, Tangents
from tangent_kernels.attention.configs import Key, family, kernel_of, table, using
from tangent_kernels.attention.configs import dim_class as class_of
from tangent_kernels.attention.forward import plan_jvp
from tangent_kernels.attention.gradients import plan_second_vjp, plan_vjp
from torch import Tensor

KERNELS = {
    "query": "grad_query_kernel",
    "key value": "grad_key_value_kernel",
    "mask": "grad_mask_kernel",
}
TANGENTS = {"x1": 1, "x2": 2, "x4": 4, "masked": 1}


def variants_of(key: Key) -> tuple[str, ...]:
    """Variants of a call that this key's tiles are for, beside "plain"."""
    direction = key.direction
    if direction in ("forward x2", "forward x4"):
        return ("causal", "grouped")
    if direction == "forward masked":
        return ("boolean", "causal", "dropout", "grouped")
    if direction == "forward x1" or _of_mask(direction):
        return ("causal", "dropout", "grouped")
    if direction.endswith(" masked"):
        return ("boolean", "causal", "dropout")
    if key._replace(direction=f"{direction} masked") in table():
        return ("grouped",)
    return ("boolean", "additive", "causal", "dropout", "grouped")


def _of_mask(direction: str) -> bool:
    """Whether every call of this direction's kernel has an additive mask, with a tangent."""
    return direction == "forward masked" or direction.endswith(" mask")


@dataclass(frozen=True)
class Case:
    """A call for which one kernel is compiled or timed."""

    direction: str  # of configs.DIRECTIONS
    arch: int  # compute capability, 10 * major + minor
    dtype: torch.dtype
    dim: int
    variant: str = "plain"
    batch: int = 2
    heads: int = 4
    tokens: int = 197

    @property
    def key(self) -> Key:
        """The entry of `configs.json` that has its tiles."""
        bits = 8 * self.dtype.itemsize
        return Key(self.direction, family(self.arch, bits), bits, class_of(self.dim))

    @property
    def plainly_masked(self) -> bool:
        """Whether the plain call of tiles for masked ones: it has an additive mask."""
        return self.variant == "plain" and self.direction.endswith(" masked")

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.direction}, sm_{self.arch}, {kind}, {self.dim}, {self.variant}"


def launch_of(case: Case, config: Config | None = None, device: str = "cpu") -> Launch:
    """The launch of the case's kernel, with ``config``, by default the one of `configs.json`.

    All operands have tangents, and all gradients are needed; the operands are packed as in timm's
    ViT.
    """
    with using(case.key, config) if config else contextlib.nullcontext():
        launches = _plan(case, device)
    order, _, rest = case.direction.partition(" ")
    if order != "forward":
        name = KERNELS[kernel_of(case.direction)]
        (launch,) = (one for one in launches if one.kernel.__name__ == name)
        return launch
    (launch,) = launches
    assert launch.arguments["TANGENTS"] == TANGENTS[rest], f"no tiles for {case.name}"
    return launch


def _plan(case: Case, device: str) -> list[Launch]:
    order, _, rest = case.direction.partition(" ")
    count = TANGENTS.get(rest, 1)
    call, mask_t = _call(case, count, device)
    by_mask = kernel_of(case.direction) == "mask"
    needs = (not by_mask, not by_mask, not by_mask, by_mask)
    if order == "first":
        output, lse, _ = _results(call, 1)
        return plan_vjp(call, output[0], lse, torch.empty_like(output), needs)[-1]
    key_t = _heads(count, *call.key.shape, like=call.key)
    value_t = torch.empty_like(key_t)
    query_t = _heads(count, *call.query.shape, like=call.query)
    if order == "forward":
        return plan_jvp(call, query_t, key_t, value_t, mask_t)[-1]
    tangents = Tangents(call, query_t, key_t, value_t, mask_t)
    output, lse, mu = _results(call, 1)
    needs_t = (False,) * 4 if order == "primal" else needs
    return plan_second_vjp(
        call, tangents, output[0], output, lse, mu, output[0], output, needs, needs_t
    )[-1]


def _call(case: Case, tangents: int, device: str) -> tuple[Call, Tensor | None]:
    """The primal call, and the tangent of its mask."""
    batch, heads, tokens, dim = case.batch, case.heads, case.tokens, case.dim
    packed = torch.randn(batch, tokens, 3, heads, dim, device=device).to(case.dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    if case.variant == "grouped":
        key, value = key[:, ::2], value[:, ::2]
    mask = mask_t = seed = None
    if case.variant == "boolean":
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
    elif case.variant == "additive" or _of_mask(case.direction) or case.plainly_masked:
        mask = torch.randn(1, heads, tokens, tokens, device=device).to(case.dtype)
        mask_t = torch.randn(tangents, *mask.shape, device=device).to(case.dtype)
    if case.variant == "dropout":
        seed = torch.zeros(batch, dtype=torch.int64, device=device)
    call = Call(
        query,
        key,
        value,
        mask,
        seed,
        scale=dim**-0.5,
        dropout_p=0.1 if seed is not None else 0.0,
        is_causal=case.variant == "causal",
        target=case.arch,
    )
    return call, mask_t


def _heads(*shape: int, like: Tensor) -> Tensor:
    """Random (R, B, H, N, D), whose memory is (R, B, N, H, D)."""
    count, batch, heads, tokens, dim = shape
    memory = torch.randn(count, batch, tokens, heads, dim, device=like.device)
    return memory.to(like.dtype).transpose(2, 3)


def _results(call: Call, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random results of a forward pass: R outputs or tangents, lse, μ."""
    output = _heads(count, *call.query.shape, like=call.query)
    lse = torch.randn(call.query.shape[:3], device=call.query.device) + 5
    return output, lse, torch.randn(count, *lse.shape, device=lse.device)
