"""The tangent model: computes f(x; w0) + J(x) Δw from an anchor and its deltas in one pass."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tangent_ops.delta import (
    Delta,
    DeltaMeta,
    check_anchor,
    check_kind,
    check_layout,
    check_values,
    fingerprint,
)
from tangent_ops.errors import NoGradientWarning, UnsupportedError, few
from tangent_ops.family import Family, after_blocks, block_names, family_of
from tangent_ops.model.allocator import keep_memory
from tangent_ops.model.check_derivatives import can_check, check_adjoint
from tangent_ops.model.checkpointing import find_blocks, find_switches, take_flags
from tangent_ops.model.dual_call import dual_call, multiplied
from tangent_ops.model.eval_caches import Kept
from tangent_ops.model.features import Trunk, split_model
from tangent_ops.model.read_rows import agrees, count_read_rows_of_calls, reading_rows
from tangent_ops.model.tree import Tree
from tangent_ops.ops.factored import Factors
from tangent_ops.ops.levels import alone, in_turn, is_compiling


class LinearizedModel(nn.Module):
    """f(x; w0) + J(x) Δw, with Δw as ordinary parameters. Made by :func:`linearize`.

    Both terms come from one forward pass in forward-mode AD: trained parameters are dual tensors
    (w0, Δw), and operations that depend on none of them run without a tangent. The anchor stays in
    eval mode, also after ``train()``: dropout and stochastic depth are off, and batch norm uses its
    running statistics.

    Any thread may call it. Calls of all models run one at a time, since PyTorch has one
    forward-mode level per process. Compiled calls do not wait: with several threads, compile all
    models or none, and call each once before the threads start.

    Attributes:
        anchor: the frozen model at w0.
        grad_checkpointing: whether blocks are repeated in the backward pass; see
            :meth:`set_grad_checkpointing`.
        kept: clears what calls of the anchor cache.
        rank: rank of its low-rank deltas; None if all are full.
        trainable: the pattern that chose the trained parameters, as text.
        model_name: the anchor's name.
    """

    def __init__(self, anchor: nn.Module, delta: Tree, basis: Tree, left: Tree, record: Record):
        super().__init__()
        self.anchor = anchor
        self.delta = delta
        self.basis = basis
        self.left = left
        self._record = record
        self.kept = Kept(anchor)
        self._wants_check = self._unchecked = False
        self._names_idle = True
        self._multiplies = False  # B A, because a function that is not seen gets a weight
        self._agrees: bool | None = None  # the last block's two forms; None before the first call
        self._switches = tuple(find_switches(anchor))
        self.grad_checkpointing = False

    def forward(self, *args, **kwargs) -> Any:
        """f(x; w0) + J(x) Δw, shaped as the model's own output, of its own class.

        Raises:
            UnsupportedError: the output holds something else than tensors, plain values, and
                tuples, lists and dicts of them; an operation has no derivative, or a derivative
                would get lost (at the first call, see :func:`linearize`); or a forward-mode level
                is open in which the call cannot nest: a ``dual_level()`` around it, or a level of
                another thread outside of :class:`tangent_ops.fused_forward_ad`.
        """
        primal, tangent = self.primal_and_tangent(*args, **kwargs)
        return tree_map(lambda p, t: p + t if isinstance(p, Tensor) else p, primal, tangent)

    def primal_and_tangent(self, *args, **kwargs) -> tuple[Any, Any]:
        """The pair f(x; w0), J(x) Δw, each shaped as the model's own output."""
        if not is_compiling() and torch.is_inference_mode_enabled():
            # inference_mode switches forward mode off: J(x) Δw would silently be 0.
            with torch.inference_mode(False), torch.no_grad():
                return self.primal_and_tangent(*args, **kwargs)
        return in_turn(lambda: self._call(args, kwargs))

    def _call(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        self.check_once(*args, **kwargs)
        directions, blocks = self.directions(), self._blocks()
        eager = not is_compiling()
        if eager and any(delta.device.type == "cpu" for delta in self.deltas().values()):
            keep_memory()
        mask = len(args) != 1 or bool(kwargs)
        # Without a trained block the value is what the anchor's own operations give.
        trained = any(name.startswith("blocks.") for name in self.delta.names)
        rows = self._read_rows() if eager and trained and not mask and not blocks else 0
        with reading_rows(self.anchor, rows) if rows else contextlib.nullcontext():
            return dual_call(self.anchor, directions, self.kept, args, kwargs, blocks)

    def _read_rows(self) -> int:
        """How many rows a call of the anchor reads of its last block's output; 0 for all."""
        rows = count_read_rows_of_calls(self.anchor)
        if rows and self._agrees is None:
            self._agrees = agrees(self.anchor, rows)
        return rows if self._agrees else 0

    def check_once(self, *args, **kwargs) -> None:
        """Run the check of :func:`linearize` on these inputs, if it has not run yet.

        Every call of the model does this. Call it first where hooks on the anchor must not see the
        calls of the check.

        Raises:
            UnsupportedError: a derivative gets lost.
        """
        if self._unchecked and not self.uses_fsdp and can_check(self.anchor, (args, kwargs)):
            in_turn(lambda: self._check(args, kwargs))

    def _check(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        blocks = find_blocks(self.anchor) if self.grad_checkpointing else []
        check = functools.partial(check_adjoint, self.anchor, self.delta.names)
        rest = self.kept, blocks, args, kwargs
        try:
            idle = check({} if self._multiplies else self.factors(), *rest)
        except UnsupportedError:
            if self._multiplies or not self.basis.names:
                raise
            idle = check({}, *rest)
            self._multiplies = True
        self._unchecked = idle is None
        if idle and self._names_idle:
            warnings.warn(
                f"no gradient in the ordinary model either, on one sample: {few(idle)}. Deltas of "
                "parameters that never get one have no effect",
                NoGradientWarning,
                stacklevel=3,
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks save only their inputs, and run again in backward.

        A block is an element of an nn.Sequential, nn.ModuleList or nn.ModuleDict, such as
        ``model.blocks`` (see `find_blocks`). The backward pass repeats the anchor's ordinary
        forward pass of the block, so a step costs 6 forward passes of the anchor instead of 5, and
        saves as much as ordinary checkpointing. Checkpointing is on from the start if it was on in
        the original model (timm's ``set_grad_checkpointing``), and the anchor's own switch turns it
        on later. Compiled code and calls inside other transforms ignore it. Tensors that depend on
        deltas must reach a block as arguments (also in tuples, lists, dicts): others, such as an
        attribute that another module set, count as constants.

        Raises:
            UnsupportedError: the model has no blocks.
        """
        take_flags(self._switches)
        if enable and not find_blocks(self.anchor):
            raise UnsupportedError(
                f"{self.model_name} has no blocks to repeat: no element of an nn.Sequential, "
                "nn.ModuleList or nn.ModuleDict has submodules"
            )
        self.grad_checkpointing = enable
        self._unchecked |= enable and self._wants_check

    def _blocks(self) -> list[nn.Module]:
        """The blocks that this call repeats in its backward pass."""
        if is_compiling():
            return []
        if take_flags(self._switches):
            self.set_grad_checkpointing(True)
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return []
        frozen = not any(parameter.requires_grad for parameter in self.anchor.parameters())
        return find_blocks(self.anchor) if frozen else []

    def deltas(self) -> dict[str, nn.Parameter]:
        """The live delta parameters, named as the anchor's: Δw, its B (out, rank), or its core."""
        return alone(self.delta.tensors)  # another thread's functional_call may replace them

    def delta_dict(self) -> Delta:
        """A copy of the deltas on their device, with the metadata of their origin."""
        tensors = {name: delta.detach().clone() for name, delta in self.deltas().items()}
        meta = DeltaMeta(self.fingerprint, self.model_name, self.trainable)
        meta = replace(meta, rank=self.rank, basis=self.basis_fingerprint)
        return Delta(tensors, meta)

    def full_delta_dict(self) -> Delta:
        """A copy of the deltas as Δw, multiplied out, for models without ``rank`` or ``core``."""
        tensors = {name: full.detach().clone() for name, full in self._full_deltas().items()}
        return Delta(tensors, DeltaMeta(self.fingerprint, self.model_name, self.trainable))

    def _full_deltas(self) -> dict[str, Tensor]:
        """Δw, shaped as the anchor's parameters, in the deltas' own dtype."""
        return multiplied(self.anchor, self.directions())

    def directions(self) -> dict[str, Tensor | Factors]:
        """The live Δw by name: tensors, or factors that the model's layers compute with."""
        found: dict[str, Tensor | Factors] = {**self.deltas(), **self.factors()}
        return {**multiplied(self.anchor, found)} if self._multiplies else found

    def factors(self) -> dict[str, Factors]:
        """Δw = L T R of the deltas that are not full: the live delta T, and the fixed factors."""
        deltas, right, left = self.deltas(), self.basis.tensors(), self.left.tensors()
        return {name: Factors(deltas[name], right[name], left.get(name)) for name in right}

    def load_delta_dict(self, delta: Mapping[str, Tensor]) -> None:
        """Overwrite the deltas in place, or raise and change nothing.

        Raises:
            DeltaError: ``delta`` has another anchor, rank or basis (if it records one), other
                names or shapes, or values that are not finite.
        """
        own = self.deltas()
        meta = getattr(delta, "meta", None)
        check_anchor(meta, self.fingerprint, self.model_name, "the delta")
        check_kind(meta, self.rank, self.basis_fingerprint, "the delta")
        check_values(delta, "the delta")
        check_layout(delta, own, "the delta")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(delta[name])

    @torch.no_grad()
    def zero_(self) -> LinearizedModel:
        """Set every delta to zero, in place: the model computes what its anchor does."""
        for parameter in self.deltas().values():
            parameter.zero_()
        return self

    def split(self) -> tuple[Trunk, LinearizedModel]:
        """Split in front of the first trained block.

        Returns:
            ``trunk`` maps inputs to tokens, without gradients; ``tail`` maps tokens to what this
            model returns. They share delta parameters: training the tail trains this model.

        Raises:
            UnsupportedError: a parameter below the blocks is trained, or it cannot be split.
        """
        names, own = [f"{name}." for name in block_names(self.anchor)], self.delta.names
        trained = [i for i, name in enumerate(names) if any(n.startswith(name) for n in own)]
        start = min(trained, default=len(names))
        inside = (*names[start:], *(f"{name}." for name in after_blocks(self.anchor)))
        if below := [name for name in own if not name.startswith(inside)]:
            raise UnsupportedError(
                f"no part of the model is frozen below its first trained parameter: {below[0]} "
                "is trained. Train without a feature cache."
            )
        trunk, tail = split_model(self.anchor, start)
        trained_part = LinearizedModel(tail, self.delta, self.basis, self.left, self._record)
        trained_part._multiplies = self._multiplies
        trained_part._wants_check, trained_part._unchecked = self._wants_check, self._unchecked
        trained_part.grad_checkpointing = self.grad_checkpointing and bool(find_blocks(tail))
        return trunk, trained_part

    def __repr__(self) -> str:
        trained = sum(delta.numel() for delta in self.deltas().values())
        anchor = sum(parameter.numel() for parameter in self.anchor.parameters())
        return (
            f"{type(self).__name__}({self.model_name}, trainable={self.trainable!r}{self._kind()}: "
            f"{trained:,} trained, {anchor:,} in the anchor)"
        )

    def summary(self) -> None:
        """Print trained and frozen parameter counts by group: a block, or another child module.

        A delta in factors counts the elements of the trained one, and none as frozen.
        """
        deltas = self.deltas()
        rows: dict[str, list[int]] = {}
        named = block_names(self.anchor).items() if self.tangent_family.blocks(self.anchor) else ()
        block_of = {id(p): name for name, block in named for p in block.parameters()}
        for name, parameter in self.anchor.named_parameters():
            group = block_of.get(id(parameter)) or name.partition(".")[0]
            row = rows.setdefault(group, [0, 0])
            if name in deltas:
                row[0] += deltas[name].numel()
            else:
                row[1] += parameter.numel()
        rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
        width = max(map(len, rows))
        print(f"{self.model_name}, linearized (trainable: {self.trainable}{self._kind(' ')})")
        print(f"{'group':<{width}} {'trained':>14} {'frozen':>14}")
        for group, (trained, frozen) in rows.items():
            print(f"{group:<{width}} {trained:>14,} {frozen:>14,}")

    def _kind(self, sign: str = "=") -> str:
        if self.left.names:
            return ", core"
        return "" if self.rank is None else f", rank{sign}{self.rank}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the anchor's state, in hexadecimal; computed once, at first use."""
        return self._record.fingerprint

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP divides the anchor (:func:`tangent_ops.training.fsdp.fsdp_anchor`)."""
        return self._record.uses_fsdp

    def mark_fsdp(self) -> None:
        """Compute the whole anchor's fingerprint; moving, casting or loading then raises."""
        self._record.enter_fsdp()

    @property
    def rank(self) -> int | None:
        """Rank of low-rank deltas; None if deltas are full or cores."""
        if self.left.names:
            return None
        return next((len(basis) for basis in self.basis.tensors().values()), None)

    @property
    def basis_fingerprint(self) -> str | None:
        """SHA-256 of the deltas' fixed factors, as :attr:`fingerprint`; None if all are full."""
        return self._record.basis_fingerprint

    @property
    def basis_remembers(self) -> frozenset[bytes]:
        """Hashes of the samples that a `CoreBasis` was computed from."""
        return self._record.basis_remembers

    @property
    def trainable(self) -> str:
        return self._record.trainable

    @property
    def tangent_family(self) -> Family:
        """What tells the anchor's blocks, head and logits."""
        return family_of(self.anchor)

    @property
    def model_name(self) -> str:
        return self._record.model_name

    def train(self, mode: bool = True) -> LinearizedModel:
        super().train(mode)
        self.anchor.eval()
        return self

    def _apply(self, *args, **kwargs):  # .to(), .half(), ...
        self._record.anchor_changes()
        self.kept.put_back()
        result = super()._apply(*args, **kwargs)
        self.kept = Kept(self.anchor)
        return result

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._record.anchor_changes()
        super()._load_from_state_dict(*args, **kwargs)


class Record:
    """The anchor, basis and parameters that deltas belong to; a tail shares the model's record."""

    def __init__(self, anchor: nn.Module, basis: Tree, left: Tree, trainable: str):
        self.anchor = anchor
        self.basis, self.left = basis, left
        self.trainable = trainable
        self.uses_fsdp = False
        self.basis_remembers: frozenset[bytes] = frozenset()

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.anchor.state_dict())

    @functools.cached_property
    def basis_fingerprint(self) -> str | None:
        if not self.basis.names:
            return None
        left = {f"left.{name}": value for name, value in self.left.tensors().items()}
        return fingerprint({**self.basis.tensors(), **left})

    def enter_fsdp(self) -> None:
        """Compute the fingerprints now: each process has only a part of the anchor later."""
        _ = self.fingerprint, self.basis_fingerprint
        self.uses_fsdp = True

    def anchor_changes(self) -> None:
        if self.uses_fsdp:
            raise UnsupportedError(
                "the anchor is under FSDP, and stays as it is: move, cast or load the model before "
                "fsdp_anchor, and leave out `device`"
            )
        for cached in ("fingerprint", "basis_fingerprint"):
            self.__dict__.pop(cached, None)

    @property
    def model_name(self) -> str:
        timms = (getattr(self.anchor, "pretrained_cfg", None) or {}).get("architecture")
        hub_s = getattr(getattr(self.anchor, "config", None), "name_or_path", None)
        return str(timms or hub_s or type(self.anchor).__name__)
