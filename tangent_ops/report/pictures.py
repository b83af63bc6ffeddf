"""Small copies of images, as data URIs."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence

from PIL import Image
from tqdm import tqdm

from tangent_ops.errors import ArgumentError, SampleError, UnsupportedError
from tangent_ops.report.shard_facts import ShardFacts
from tangent_ops.shards import Plan
from tangent_ops.shards.manifest import Sample

SIDE = 96  # pixels of the longer side, at most
EACH = 8  # pictures of a shard
_QUALITY = 80  # of JPEG
_SMALL = 64  # below this, pixels are kept as they are


def data_uri(image: Image.Image) -> str:
    """An image of at most `SIDE` pixels, as a data URI: a PNG if it is tiny, else a JPEG."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(small.size) <= _SMALL else "jpeg"
    small.save(buffer, kind, **({} if kind == "png" else {"quality": _QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def add_pictures(plan: Plan, shards: Sequence[ShardFacts], progress: bool) -> str:
    """Add pictures to shards.

    Returns:
        Why some have none, in a sentence; "" if all have theirs.
    """
    chosen = [(shard, sample) for shard in shards for sample in _spread(shard.samples)]
    if not chosen:
        return ""
    ids, targets, contents = zip(*((s.id, s.target, s.content) for _, s in chosen), strict=True)
    missing = 0
    try:
        there = plan.data.pick(ids, targets, contents, None)
        bar = tqdm(chosen, "pictures", unit="image", delay=2, leave=False, disable=not progress)
        for index, (shard, sample) in enumerate(bar):
            try:
                shard.pictures.append((sample, data_uri(there.image(index))))
            except SampleError:
                missing += 1
    except (ArgumentError, UnsupportedError) as error:
        return f"The images cannot be shown: {error}."
    if missing:
        return f"{missing} of {len(chosen)} pictures are left out: their images cannot be read."
    return ""


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Some samples of as many classes as possible: the first of each class, then the second."""
    of_class: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        of_class[sample.target].append(sample)
    rounds = max(map(len, of_class.values()), default=0)
    turns = [of_class[key][turn : turn + 1] for turn in range(rounds) for key in sorted(of_class)]
    return [sample for one in turns for sample in one][:EACH]
