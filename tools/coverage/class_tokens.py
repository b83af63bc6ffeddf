"""Which class-token models of timm run their last block for the read rows alone.

`python -m tools.coverage.class_tokens` instantiates every model with a class token on the meta
device, which takes a minute, and writes the section of docs/coverage.md.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

from tangent_ops.errors import UnsupportedError
from tangent_ops.model.features import split_model
from tangent_ops.model.read_rows import count_read_rows, forms_keys, why_not
from tools.machine import ROOT

STORED = ROOT / "tools" / "coverage" / "class_tokens.md"
SOURCES = ("beit", "cait", "convit", "deit", "eva", "mvitv2", "tnt", "vision_transformer")
SOURCES += ("vision_transformer_hybrid", "vision_transformer_relpos", "volo", "xcit")
MORE_THAN_TOKENS = "not split: its blocks take more than the tokens"
LATER = "not split: the class token enters between or after the blocks"
CANNOT_SPLIT = {
    "Beit": MORE_THAN_TOKENS,
    "Eva": MORE_THAN_TOKENS,
    "TNT": MORE_THAN_TOKENS,
    "VisionTransformerRelPos": MORE_THAN_TOKENS,
    "Xcit": MORE_THAN_TOKENS,
    "Cait": LATER,
    "ConVit": LATER,
}
INTRODUCTION = """
## The last block for the read rows

Models of timm with a class token that is pooled, by the module that defines them. *without keys*:
neither keys nor values are formed; *with keys*: keys have a norm. Others run the ordinary block.
"""


def main() -> None:
    answers = ((_model_to_module[n], answer_of(n)) for n in timm.list_models() if _chosen(n))
    counts = Counter((module, answer) for module, answer in answers if answer is not None)
    lines = [f"| {m} | {n} | {a} |\n" for (m, a), n in sorted(counts.items())]
    splits = sum(n for (_, answer), n in counts.items() if not answer.startswith("not split"))
    takes = sum(n for (_, answer), n in counts.items() if answer.startswith("rows"))
    share = f"{100 * takes / splits:.0f} %"
    total = f"\n**{takes} of the {splits} models that can be split take it ({share}).**\n"
    table = ["\n| family | models | answer |\n| --- | --- | --- |\n", *lines]
    STORED.write_text("".join([INTRODUCTION, total, *table]), encoding="utf-8")


def _chosen(name: str) -> bool:
    return _model_to_module[name] in SOURCES


def answer_of(name: str) -> str | None:
    """What a model's last block does; None if the model pools no class token."""
    with torch.device("meta"):
        model = timm.create_model(name)
    if getattr(model, "cls_token", None) is None:
        return None
    if getattr(model, "global_pool", "token") != "token":
        return None
    return _answer(model)


def _answer(model: nn.Module) -> str:
    kind = type(model).__name__
    if kind in CANNOT_SPLIT:
        return CANNOT_SPLIT[kind]
    try:
        tail: Any = split_model(model, 0)[1]
    except UnsupportedError as error:
        return f"not split: {str(error).split('(')[0].strip()}"
    except AttributeError:
        return "not split: it has no blocks"
    last = list(tail.blocks.values())[-1]
    if not count_read_rows(model):
        return f"ordinary block: {why_not(last)}"
    rows = "1 row" if count_read_rows(model) == 1 else "2 rows"
    return f"rows: {rows}, {'with' if forms_keys(last) else 'without'} keys"


if __name__ == "__main__":
    main()
