"""Records inputs and cotangents of the trained layers in one forward and backward pass.

The derivative of J(x) Δ by Δ is J(x), whatever Δ is. So the cotangent of a layer's output tangent
equals the cotangent of the layer's output in the anchor, and a pass of the tangent model gives all
that the layers' per-sample gradients need, without a pass of the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.jacobian import Pair
from tangent_ops.losses import at_least_single
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call, in_turn


class Seen:
    """One call of a layer.

    Attributes:
        activations: its input, (n, ...).
        output: shape of its output.
        receive: called in the backward pass with the output's cotangent, shaped as the output.
    """

    def __init__(self, activations: Tensor, output: torch.Size) -> None:
        self.activations = activations
        self.output = output
        self.receive: Callable[[Tensor], None] = lambda cotangent: None


class Pass:
    """The forward pass of a batch; its backward pass can be repeated.

    Attributes:
        logits: f + J Δ, (n, ...), in float32 at least.
        calls: each layer's calls, in order; None for a call without exactly one tensor in and out.
    """

    def __init__(
        self, tangent: LinearizedModel, layers: Mapping[str, nn.Module], inputs: Tensor
    ) -> None:
        self.calls: dict[str, list[Seen | None]] = {name: [] for name in layers}
        # The deltas get no gradients, so the graph needs another leaf.
        seed = torch.zeros((), device=inputs.device, requires_grad=True)
        deltas = {f"tangent.delta.{n}": delta.detach() for n, delta in tangent.deltas().items()}
        autocast = torch.autocast(inputs.device.type, enabled=False)

        def run() -> tuple[object, Tensor]:
            tangent.check_once(inputs)  # without the taps
            with torch.enable_grad(), autocast, self._tapped(layers, seed):
                return functional_call(Pair(tangent), deltas, (inputs,))

        primal, output = in_turn(run)  # one thread at a time: all threads run the hooks
        if not isinstance(primal, Tensor) or primal.shape[:1] != inputs.shape[:1]:
            raise UnsupportedError(
                f"the model returns a {type(primal).__name__}; per-sample gradients need one "
                "tensor with a row to each sample"
            )
        self._output = output
        self.logits = at_least_single((primal + output).detach())

    def seen(self, name: str) -> Seen:
        """The one call of a layer that is called once."""
        (seen,) = self.calls[name]
        assert seen is not None
        return seen

    def activations(self, name: str) -> Tensor:
        return self.seen(name).activations

    def back(self, cotangent: Tensor, *, again: bool = False) -> None:
        """Pull a cotangent of the logits back; every layer's `Seen.receive` is called.

        Args:
            cotangent: shaped as the logits.
            again: whether another backward pass follows.
        """
        if self._output.requires_grad:
            self._output.backward(cotangent.to(self._output.dtype), retain_graph=again)

    @contextmanager
    def _tapped(self, layers: Mapping[str, nn.Module], seed: Tensor) -> Iterator[None]:
        def hook(name: str) -> Callable:
            def tap(module: nn.Module, inputs: tuple, keywords: dict, output: object) -> object:
                seen = _seen(inputs, keywords, output)
                self.calls[name].append(seen)
                if seen is None:
                    return output
                primal, tangent = forward_ad.unpack_dual(output)  # pyright: ignore
                if tangent is None:
                    return output
                tapped = _Tap.apply(tangent, seed, lambda cotangent: seen.receive(cotangent))
                return forward_ad.make_dual(primal, tapped)  # pyright: ignore

            return tap

        handles = [
            module.register_forward_hook(hook(name), with_kwargs=True)
            for name, module in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _seen(inputs: Sequence, keywords: dict, output: object) -> Seen | None:
    one = len(inputs) == 1 and not keywords and isinstance(inputs[0], Tensor)
    if not one or not isinstance(output, Tensor):
        return None
    return Seen(forward_ad.unpack_dual(inputs[0]).primal.detach(), output.shape)


class _Tap(torch.autograd.Function):
    """The identity; its backward pass calls `receive` with the cotangent."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, tangent: Tensor, seed: Tensor, receive: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.receive = receive  # pyright: ignore[reportAttributeAccessIssue]
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        ctx.receive(cotangents[0])  # pyright: ignore[reportAttributeAccessIssue]
        return cotangents[0], None, None
