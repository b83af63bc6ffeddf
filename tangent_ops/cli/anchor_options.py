"""The options of the anchor of ``tangent-ops finetune``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_ops.errors import ArgumentError

_LARGEST = 1 << 16  # pixels, as in an anchor's file


@dataclass(frozen=True)
class AnchorOptions:
    """The options in the panel Anchor, and the seed of its random draws."""

    model: str = "vit_base_patch16_224"
    img_size: int | None = None
    pretrained: bool = True
    weights: Path | None = None
    public: Path | None = None
    anchor: Path | None = None
    seed: int = 0

    def built(self, classes: int) -> dict[str, Any]:
        """What timm builds the model from, besides its name."""
        size = {} if self.img_size is None else {"img_size": self.img_size}
        return {"num_classes": classes, **size}

    def check(self, *, basis: bool = False) -> None:
        """Raise ArgumentError for wrong options, without building a model.

        Args:
            basis: public images give a basis, too, and are needed.
        """
        if self.public is not None and not self.public.is_dir():
            raise ArgumentError(f"--public {self.public}: there is no such folder")
        if basis and self.public is None:
            raise ArgumentError(
                "--method statistics needs --public, images that will never have to be forgotten: "
                "the basis is computed from them, and remembers them"
            )
        if self.anchor is not None:
            if self.weights or (self.public and not basis):
                raise ArgumentError("--anchor is a whole model: leave --weights and --public out")
            from tangent_ops.shards import read_anchor

            read_anchor(self.anchor)
            return
        if self.img_size is not None and not 0 < self.img_size < _LARGEST:
            raise ArgumentError(f"--img-size {self.img_size}: expected 1 to {_LARGEST - 1} pixels")
        import timm

        if not timm.is_model(self.model.split(".")[0]):
            close = difflib.get_close_matches(self.model, timm.list_models(), n=3, cutoff=0.5)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise ArgumentError(f"--model {self.model}: timm has no such model{hint}")
        if "." in self.model and self.model not in timm.list_pretrained(self.model):
            known = timm.list_pretrained(f"{self.model.split('.')[0]}.*")
            words = f"it has {', '.join(known)}" if known else "it has no published weights"
            raise ArgumentError(f"--model {self.model}: timm has no such weights; {words}")
        if self.weights is not None and not self.weights.is_file():
            raise ArgumentError(f"--weights {self.weights}: there is no such file")
        if self.weights is not None and self.weights.suffix != ".safetensors":
            raise ArgumentError(
                f"--weights {self.weights}: expected a .safetensors file; other formats are "
                "unpickled, which can execute what is in them"
            )
