"""Shards at scale: plans, training on one machine or a Ray cluster, and forgetting."""

from typing import TYPE_CHECKING

from tangent_ops.lazy_names import lazy

if TYPE_CHECKING:
    from tangent_ops.shards.anchor import AnchorInfo, load_anchor, read_anchor, save_anchor
    from tangent_ops.shards.assignment import by_class, by_column, by_hash
    from tangent_ops.shards.composing import compose_run, compositions
    from tangent_ops.shards.data import ImageData, Samples
    from tangent_ops.shards.forgetting import Forgotten, find, forget
    from tangent_ops.shards.jobs import Job, Shard
    from tangent_ops.shards.plan import Plan
    from tangent_ops.shards.recipe import ShardRecipe
    from tangent_ops.shards.run import Report, run_shards
    from tangent_ops.shards.settling import Settled, check_settled, settle, settled_ledger
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "anchor": "AnchorInfo load_anchor read_anchor save_anchor",
            "assignment": "by_class by_column by_hash",
            "composing": "compose_run compositions",
            "data": "ImageData Samples",
            "forgetting": "Forgotten find forget",
            "jobs": "Job Shard",
            "plan": "Plan",
            "recipe": "ShardRecipe",
            "run": "Report run_shards",
            "settling": "Settled check_settled settle settled_ledger",
        },
    )

__all__ = [
    "AnchorInfo",
    "Forgotten",
    "ImageData",
    "Job",
    "Plan",
    "Report",
    "Samples",
    "Settled",
    "Shard",
    "ShardRecipe",
    "by_class",
    "by_column",
    "by_hash",
    "check_settled",
    "compose_run",
    "compositions",
    "find",
    "forget",
    "load_anchor",
    "read_anchor",
    "run_shards",
    "save_anchor",
    "settle",
    "settled_ledger",
]
