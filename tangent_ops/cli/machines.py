"""Where shards are trained: options that ``finetune`` and ``forget`` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tangent_ops.errors import ArgumentError


@dataclass(frozen=True)
class Machines:
    """The executor's options, as `run_shards` takes them."""

    executor: Literal["local", "ray"] = "local"
    workers: int | None = None
    retries: int = 3
    address: str | None = None

    def check(self) -> None:
        """Raise ArgumentError for options out of range, or that do not fit together."""
        from tangent_ops.shards.run import check_executor

        if self.workers is not None and self.workers < 1:
            raise ArgumentError(f"--workers {self.workers}: expected 1 or more")
        if self.address is not None and self.executor != "ray":
            raise ArgumentError("--address is for --executor ray: give that, too")
        check_executor(self.executor, self.workers, self.retries, self.address)


HELPS = {
    "executor": "Where shards are trained.",
    "workers": "Shards at a time. Default: one per GPU, or as many as the cores allow.",
    "retries": "How often a shard is started again if its process dies.",
    "address": "Address of a Ray cluster. Default: start Ray on this machine.",
}
