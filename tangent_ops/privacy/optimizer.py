"""Opacus' optimizer for sums of clipped gradients, with noise from a `NoiseSource`."""

from __future__ import annotations

from collections.abc import Mapping

from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tangent_ops.privacy.noise import NoiseSource


class PrivateOptimizer(DPOptimizerFastGradientClipping):
    """Makes steps with the gradient (Σ_i clipped g_i + N(0, (σ C)²)) / E + l2 Δ.

    The sum is over the physical batches of a logical batch (`BatchMemoryManager` marks which belong
    together), and over the processes of a group. Only the first process adds the noise.

    Args:
        optimizer: makes a step with a gradient.
        noise: the source of the noise.
        noise_multiplier: σ.
        max_grad_norm: C.
        expected_batch_size: E; the sum is divided by it, whatever the batch's size is.
        l2: the penalty's weight; the penalty depends on no data and gets no noise.
        group: whether there are several processes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        noise: NoiseSource,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        l2: float,
        group: bool,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,  # pyright: ignore[reportArgumentType]
        )
        self._noise = noise
        self._size = expected_batch_size
        self._l2 = l2
        self._group = group

    def take(self, sums: Mapping[nn.Parameter, Tensor]) -> bool:
        """Add a physical batch's clipped sum; make a step after the last one of a logical batch.

        Returns:
            Whether a step was made.
        """
        for parameter, value in sums.items():
            parameter.grad = value
        self.step()
        self.zero_grad(set_to_none=True)
        return not self._is_last_step_skipped

    def add_noise(self) -> None:
        """Add the noise in the first process, and sum over the processes."""
        first = not self._group or distributed.get_rank() == 0
        for parameter in self.params:
            total = parameter.summed_grad  # pyright: ignore[reportAttributeAccessIssue]
            if first:
                std = self.noise_multiplier * self.max_grad_norm
                total = total + self._noise.normal(total.shape, std, total.dtype, total.device)
            if self._group:
                distributed.all_reduce(total)
            parameter.grad = total

    def scale_grad(self) -> None:
        for parameter in self.params:
            assert parameter.grad is not None
            parameter.grad.div_(self._size)
            if self._l2:
                parameter.grad.add_(parameter.detach(), alpha=self._l2)
