"""What the Triton backend leaves to the eager formulas, with N x M matrices in memory.

Forward mode over forward mode by the operands, and every derivative of second_vjp: derivatives of
third order and more. All are compositions of differentiable torch operations, so they nest on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.reference import attention as reference

Options = tuple[float, float, bool]  # scale, dropout_p, is_causal


def second_derivative(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    directions: Sequence[Tensor | None],
    options: Options,
) -> Tensor:
    """D²O(p)[p', t], (R, B, H, N, Dv): how the R tangents change as the operands move.

    Args:
        primals: query, key, value, mask.
        tangents: (R, ...) of each, or None for zero.
        directions: p', as the primals, or None for zero.
        options: of the call.
    """
    _refuse_dropout(options)
    moved = [i for i, d in enumerate(directions) if d is not None]

    def tangent(*some):
        replaced = list(primals)
        for i, x in zip(moved, some, strict=True):
            replaced[i] = x
        return _eager_jvp(replaced, tangents, options)[1]

    return _jvp(tangent, [primals[i] for i in moved], [directions[i] for i in moved])[1]


@dataclass(frozen=True)
class EagerSecondVjp:
    """second_vjp as a function of its floating-point inputs, and its derivatives."""

    function: Callable[..., tuple[Tensor, ...]]  # the needed gradients
    inputs: list[Tensor]
    present: list[bool]  # which of query, key, value, mask, their tangents, G and H are inputs
    needs: Sequence[bool]

    def pull_back(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the ten by cotangents of all eight results."""
        outputs, pull_back, *_ = torch.func.vjp(self.function, *self.inputs)
        given = [x for x, need in zip(grads, self.needs, strict=True) if need]
        cotangents = [
            torch.zeros_like(one) if grad is None else grad
            for grad, one in zip(given, outputs, strict=True)
        ]
        found = iter(pull_back(tuple(cotangents)))
        return [next(found) if here else None for here in self.present]

    def push_forward(self, directions: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Tangents of all eight results by directions of the ten."""
        kept = [d for d, here in zip(directions, self.present, strict=True) if here]
        filled = [
            torch.zeros_like(x) if d is None else d for d, x in zip(kept, self.inputs, strict=True)
        ]
        found = iter(_jvp(self.function, self.inputs, filled)[1])
        return tuple(next(found) if need else None for need in self.needs)


def eager_second_vjp(
    saved: Sequence[Tensor | None], needs: Sequence[bool], options: Options
) -> EagerSecondVjp:
    """Of query, key, value, mask, their (R, ...) tangents, G (or None) and H.

    Args:
        saved: those ten.
        needs: which of the eight gradients are results.
        options: of the call.
    """
    _refuse_dropout(options)
    present = [x is not None and x.is_floating_point() for x in saved]
    wanted = [i for i, need in enumerate(needs) if need]

    def function(*inputs):
        given = iter(inputs)
        full: list[Any] = [
            next(given) if here else x for here, x in zip(present, saved, strict=True)
        ]
        operands, grad, grad_t = full[:8], full[8], full[9]

        def pair(*some):
            replaced = list(operands)
            for i, x in zip(wanted, some, strict=True):
                replaced[i] = x
            return _eager_jvp(replaced[:4], replaced[4:], options)

        (output, _), pull_back, *_ = torch.func.vjp(pair, *(operands[i] for i in wanted))
        return pull_back((torch.zeros_like(output) if grad is None else grad, grad_t))

    inputs = [x for x, here in zip(saved, present, strict=True) if here and x is not None]
    return EagerSecondVjp(function, inputs, present, needs)


def _eager_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], options: Options
) -> tuple[Tensor, Tensor]:
    """O and R tangents by the eager formulas."""
    query, key, value, mask = primals
    scale, _, is_causal = options
    count = next(t.shape[0] for t in tangents if t is not None)
    each = []
    for r in range(count):
        query_t, key_t, value_t, mask_t = (None if t is None else t[r] for t in tangents)
        pair = reference.attention_jvp(
            query,
            key,
            value,
            query_t,
            key_t,
            value_t,
            mask,
            mask_t,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
        )
        each.append(pair)
    return each[0][0], torch.stack([tangent for _, tangent in each])


def _jvp(function: Callable[..., Any], primals: Sequence[Any], directions: Sequence[Any]) -> Any:
    """``torch.func.jvp``, which takes no expanded tensors (vmap makes them look dense)."""

    def copies(tensors):
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)

    return torch.func.jvp(function, copies(primals), copies(directions))


def _refuse_dropout(options: Options) -> None:
    if options[1] > 0.0:
        raise UnsupportedError(
            "the Triton backend of scaled_dot_product_attention does not compute derivatives of "
            "third order, or forward mode over forward mode, with dropout; "
            "pass backend='reference', which does"
        )
