"""`Group`: the processes that train one model together, `torch.distributed`'s default group.

Each process reads all batches, and takes its part of every one. One all-reduce of all gradients,
concatenated, sums them: this is exact for parts of any size, for parameters that some processes do
not reach, and for several backward passes per step. `DistributedDataParallel` would overlap
communication with the backward pass, but takes the plain mean over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.fields import Inputs, named_tensors

Batch = tuple[Inputs, Tensor]

_BITS = 2**62 - 1  # the number and its negative fit into an int64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Group:
    """The processes of the default group, or this one alone where there is none.

    Args:
        device: of the tensors that are communicated: the model's.

    Attributes:
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        exists = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if exists else 0
        self.world = distributed.get_world_size() if exists else 1
        self.device = device

    def agree(self, **values: object) -> None:
        """Raise ArgumentError, in every process, if a value's repr differs between processes."""
        if self.world == 1:
            return
        numbers = torch.tensor([_digest(value) for value in values.values()], device=self.device)
        unlike = [name for name, one in zip(values, self._unlike(numbers), strict=True) if one]
        if unlike:
            raise ArgumentError(
                f"the processes of the group were given different {', '.join(unlike)}: give each "
                "the same, as they train one model together"
            )

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; raise ArgumentError, in every process, at one that differs."""
        if self.world == 1:
            yield from batches
            return
        ended = torch.full((3,), -1, device=self.device)
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            numbers = ended
            if batch is not None:
                size = torch.tensor(len(batch[0]), device=self.device)
                sums = [_sum_of(part).to(self.device) for part in batch]
                numbers = torch.stack([size, *sums])
            if any(self._unlike(numbers)):
                raise ArgumentError(
                    "the processes of the group read different batches. Give each the same data in "
                    "the same order, without DistributedSampler (each trains on its part of every "
                    "batch), and draw augmentation from torch's, numpy's or Python's own generator"
                )
            if batch is None:
                return
            yield batch

    def parts(self, batch: Batch, accumulate: int) -> list[Batch]:
        """This process's part of a batch, in micro-batches.

        Every process has as many of them, so that all communicate equally often; one may be empty.

        Raises:
            ArgumentError: the batch has no samples.
        """
        if len(batch[0]) == 0:
            raise ArgumentError("data yielded a batch without samples: drop it, or fill it")
        count = min(accumulate, -(-len(batch[0]) // self.world))
        own = [x.tensor_split(self.world)[self.rank] for x in batch]
        return list(zip(*(x.tensor_split(count) for x in own), strict=True))

    @contextmanager
    def own_draws(self, seed: int, step: int) -> Iterator[None]:
        """Seed what the model draws in this process; the order of the data stays the same."""
        if self.world == 1:
            yield
            return
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            own = _digest((seed, step, self.rank))
            torch.default_generator.manual_seed(own)
            if cuda:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(own)
            yield

    def broadcast(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the parameters to those of the first process."""
        if self.world == 1:
            return
        with torch.no_grad():
            for parameter in parameters:
                value = parameter.detach().contiguous()
                distributed.broadcast(value, 0)
                parameter.copy_(value)

    def sum(self, parameters: list[nn.Parameter], value: float) -> float:
        """Set gradients to their sums over the processes; return the sum of `value`.

        A gradient that is None in all processes stays None. A gradient that is not finite in one
        process is not finite in any of them afterwards.
        """
        if self.world == 1:
            return value
        double = any(parameter.dtype == torch.float64 for parameter in parameters)
        dtype = torch.float64 if double else torch.float32
        gradients = [parameter.grad for parameter in parameters]
        rest = [value, *(gradient is not None for gradient in gradients)]
        row = [
            torch.zeros_like(p, dtype=dtype).reshape(-1) if g is None else g.reshape(-1).to(dtype)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        flat = torch.cat([*row, torch.tensor(rest, dtype=dtype, device=self.device)])
        distributed.all_reduce(flat)
        *sums, end = flat.split([*(parameter.numel() for parameter in parameters), len(rest)])
        total, *reached = end.tolist()
        for parameter, one, processes in zip(parameters, sums, reached, strict=True):
            parameter.grad = one.view_as(parameter).to(parameter.dtype) if processes else None
        return total

    def _unlike(self, numbers: Tensor) -> list[bool]:
        """Tell which of these numbers differ between processes."""
        both = torch.cat([numbers, -numbers])
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
        high, low = both.chunk(2)
        return (high != -low).tolist()


def check_module(model: nn.Module) -> None:
    """Raise UnsupportedError if a model averages gradients itself, or trains under FSDP."""
    from torch.distributed.tensor import DTensor

    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            "fit in a group of processes sums gradients itself: pass model.module, without "
            "DistributedDataParallel"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UnsupportedError(
                f"{name} is under FSDP: fit in a group of processes trains whole parameters. Use "
                "fsdp_anchor, which divides only the frozen parameters of a tangent model"
            )


def check_statistics(model: nn.Module) -> None:
    """Raise UnsupportedError if a batch norm normalises by the batch, as it would see a part."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise UnsupportedError(
                f"{name} is a batch norm that normalises by the batch, but with accumulate > 1, or "
                "in a group of processes, it sees a part of one. Put it in eval mode, or train "
                "whole batches"
            )


def layout(model: nn.Module) -> list[object]:
    """Names, shapes and dtypes of the trained parameters."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [(name, tuple(p.shape), p.dtype) for name, p in trained]


def frozen_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the parameters that are not trained and of the buffers."""
    named = model.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    state = model.state_dict()
    return fingerprint({name: state[name] for name in state if name not in trained})


def _digest(value: object) -> int:
    digest = hashlib.sha256(repr(value).encode()).digest()
    return int.from_bytes(digest[:8], "little") & _BITS


def _sum_of(inputs: Inputs) -> Tensor:
    """A checksum of a tensor, or of all fields."""
    sums = [_checksum(x) for _, x in sorted(named_tensors(inputs).items())]
    return torch.stack(sums).sum()


def _checksum(x: Tensor) -> Tensor:
    """A checksum of a batch's content and of the order of its samples."""
    rows = x.detach().contiguous().reshape(len(x), -1) if x.numel() else x.new_zeros(1, 1)
    sums = rows.view(_WORDS[min(x.element_size(), 8)]).sum(1, dtype=torch.int64)
    weights = 6364136223846793005 * torch.arange(1, 2 * len(sums), 2, device=x.device)
    return (sums * weights).sum() & _BITS
