"""The state of a private fit between two steps, and the checkpoint file that resumes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tangent_ops.errors import ArgumentError
from tangent_ops.exact.checkpoint import Checkpoint
from tangent_ops.files import check_target
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.sampling import Key


class State:
    """The state of a private fit between two steps.

    Args:
        parameters: the deltas by name.
        optimizer: of these parameters.
        noise: the source of the noise.
        key: the seed of the batches.

    Attributes:
        step: how many steps are done.
        key: the seed of the batches; the checkpoint's, if there is one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        noise: NoiseSource,
        key: Key | None,
    ) -> None:
        self.step = 0
        self.key = key
        self._parameters = parameters
        self._optimizer = optimizer
        self._noise = noise
        self._file: Checkpoint | None = None
        self._every = 0
        group = distributed.is_available() and distributed.is_initialized()
        self._writes = not group or distributed.get_rank() == 0

    def keep(self, path: str | os.PathLike[str], every: int, identity: dict[str, str]) -> None:
        """Resume from a file if it exists; `advance` then updates it.

        Raises:
            ArgumentError: the file is damaged, no checkpoint, or of another fit; or the path is a
                folder, or its folder does not exist.
        """
        path = Path(path).resolve()
        check_target(path, "checkpoint")
        self._file, self._every = Checkpoint(path, identity), every
        found = self._file.read()
        if found is None:
            return
        tensors, numbers = found
        self.step = int(numbers["step"])
        key = json.loads(numbers["key"])
        self.key = None if key is None else tuple(key)
        self._noise.restore(numbers["noise"])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors.pop(f"delta|{name}"))
        for key, value in tensors.items():
            entry, name = key.split("|")
            self._optimizer.state[self._parameters[name]][entry] = value

    def check_group(self) -> None:
        """Raise ArgumentError unless all processes of the group have the same step and key."""
        found: list[object] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, (self.step, self.key))
        if any(other != found[0] for other in found):
            raise ArgumentError(
                "checkpoint is not the same file in all processes, so they would draw different "
                "batches: put it on a file system that they share"
            )

    def advance(self) -> None:
        """Count a step, and write the file if it is due."""
        self.step += 1
        if self._file is not None and self._writes and self.step % self._every == 0:
            tensors: dict[str, Tensor] = {}
            for name, parameter in self._parameters.items():
                tensors[f"delta|{name}"] = parameter.detach()
                for entry, value in self._optimizer.state[parameter].items():
                    tensors[f"{entry}|{name}"] = value
            numbers = {"step": str(self.step), "key": json.dumps(self.key)}
            self._file.write(tensors, numbers | {"noise": self._noise.state()})

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if self._file is not None and self._writes:
            self._file.remove()
