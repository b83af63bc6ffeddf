"""The anchor of ``tangent-ops finetune``: a timm model, its head fitted to public images."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tangent_ops.cli.assignment import classes_of
from tangent_ops.cli.network import WeightsSource, weights_source
from tangent_ops.errors import ArgumentError, TangentOpsError, in_words
from tangent_ops.files import to_json
from tangent_ops.shards import ImageData, Samples, ShardRecipe, read_anchor, save_anchor
from tangent_ops.shards.disjoint import PUBLIC, check_apart
from tangent_ops.shards.plan_change import differing
from tangent_ops.shards.run_folder import ANCHOR
from tangent_ops.training.head import fit_head

FOLDS = 5  # of the public images, to say how good the head is
OFFLINE = "Without a network give --weights FILE.safetensors, or --no-pretrained for random weights"
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


def check_model(options: AnchorOptions, recipe: ShardRecipe, classes: int) -> None:
    """Raise ArgumentError if timm cannot build the model, or it lacks the blocks to be trained."""
    import timm

    if options.anchor is not None:
        info = read_anchor(options.anchor)
        name, built = info.name, info.options
    else:
        name, built = options.model.split(".")[0], options.built(classes)
    try:
        with torch.device("meta"):  # shapes only: nothing is computed or allocated
            model = timm.create_model(name, pretrained=False, **built).eval()
            if options.img_size is not None:
                model(torch.zeros(1, 3, options.img_size, options.img_size))
    except Exception as error:  # whatever an architecture raises
        if options.img_size is not None and "img_size" in str(error):
            raise ArgumentError(
                f"--img-size {options.img_size}: {name} takes no size: leave it out"
            ) from error
        what = "" if options.img_size is None else f" for images of {options.img_size} pixels"
        raise ArgumentError(
            f"--model {name}: timm cannot build it{what} ({_first_line(error)}): give another model"
            f"{'' if options.img_size is None else ', or another --img-size'}"
        ) from error
    try:
        recipe.trainable(model)
    except TangentOpsError as error:
        raise ArgumentError(f"--blocks {recipe.blocks}: {error}; or give all") from error


def check_public(options: AnchorOptions, private: Samples) -> None:
    """Raise ArgumentError unless the public images are of the private ones' classes, and others."""
    if options.public is None:
        return
    public = ImageData(str(options.public)).open()
    public.check_classes(f"--public {options.public}")
    public.with_classes(classes_of(private))
    check_apart(public, private, PUBLIC)


def make_anchor(
    options: AnchorOptions, run: Path, scratch: Path, classes: Sequence[str], quiet: bool
) -> tuple[Path, str]:
    """The anchor's file, and a message about its head.

    Args:
        options: checked.
        run: a run that was made with the same options has its anchor already.
        scratch: a folder for the file, if it has to be made.
        classes: of the data.
        quiet: no bars.

    Raises:
        ArgumentError: weights that do not fit; the run's anchor was made from something else.
    """
    if options.anchor is not None:
        return options.anchor, f"the anchor is {options.anchor}"
    public = None if options.public is None else ImageData(str(options.public)).open()
    begun = (run / ANCHOR).exists()
    source = None if begun else _source(options)
    told = _origin(options, classes, public)
    if begun:
        info = read_anchor(run / ANCHOR)
        if info.origin != told:
            raise ArgumentError(
                f"{run} was begun with another anchor ({_differing(info.origin, told)}): give the "
                "same options, or another --out"
            )
        return run / ANCHOR, "going on with the run's anchor"
    name = options.model.split(".")[0]
    built = options.built(len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model, fetched = _built(options, built, source)
    words = f"its head is {'that of the weights, for as many classes' if fetched else 'random'}: "
    words += "images that never have to be forgotten (--public) make a better one"
    if public is not None:
        config = _config(options, model)
        samples = ImageData(str(options.public)).open(config).with_classes(classes)
        folds = min(FOLDS, len(samples))
        model, history = fit_head(
            model, samples, seed=options.seed, folds=folds, progress=not quiet
        )
        words = (
            f"its head is fitted to {len(samples)} public images: {history.held_out:.1%} of them "
            f"are recognised by heads fitted to the others ({folds}-fold cross-validation)"
        )
    path = scratch / ANCHOR
    save_anchor(model, path, name=name, options=built, classes=classes, origin=told)
    return path, words


def model_without_weights(options: AnchorOptions, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights, and how its images are prepared."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = timm.create_model(
            options.model.split(".")[0], pretrained=False, **options.built(classes)
        )
    return model.eval(), _config(options, model)


def _config(options: AnchorOptions, model: nn.Module) -> dict[str, Any]:
    """How images are prepared for the model."""
    from timm.data.config import resolve_model_data_config

    config = dict(resolve_model_data_config(model))
    if options.img_size is not None:
        config["input_size"] = (3, options.img_size, options.img_size)
    return config


def _origin(options: AnchorOptions, classes: Sequence[str], public: Samples | None) -> str:
    told: dict[str, Any] = {
        "model": options.model,
        "img_size": options.img_size,
        "classes": list(classes),
        "pretrained": options.pretrained and options.weights is None,
        "seed": options.seed,
    }
    if options.weights is not None:
        told["weights"] = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    if public is not None:
        found = [public.content(index) for index in range(len(public))]
        told["public"] = hashlib.sha256(to_json(found).encode()).hexdigest()
    return to_json(told)


def _differing(there: str, now: str) -> str:
    """The options that differ between two anchors' origins."""
    try:
        old, new = json.loads(there), json.loads(now)
        return differing(old, new) or "made by another release"
    except (ValueError, AttributeError):
        return "made in another way"


def _source(options: AnchorOptions) -> WeightsSource | None:
    """Where timm's weights come from; None if none are wanted; ArgumentError if there are none."""
    if options.weights is not None or not options.pretrained:
        return None
    source = weights_source(options.model)
    if source.kind == "none":
        raise ArgumentError(f"--model {options.model}: no weights, because {source.why}. {OFFLINE}")
    return source


def _built(
    options: AnchorOptions, built: dict[str, Any], source: WeightsSource | None
) -> tuple[nn.Module, bool]:
    """The model, and whether its head came with its weights."""
    import timm

    if options.weights is None:
        # Downloads try again many times, and log each time.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        here = {} if source is None or source.file is None else {"file": str(source.file)}
        try:
            model = timm.create_model(
                options.model, pretrained=options.pretrained, pretrained_cfg_overlay=here, **built
            ).eval()
        except Exception as error:  # of the hub, the network, the architecture
            raise ArgumentError(
                f"--model {options.model}: timm cannot make it ({_first_line(error)}). {OFFLINE}"
            ) from error
        published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        return model, options.pretrained and published == built["num_classes"]
    model = timm.create_model(options.model.split(".")[0], pretrained=False, **built).eval()
    try:
        state = load_file(options.weights)
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"--weights {options.weights}: {in_words(error)}") from error
    own = model.state_dict()
    head = {name for name in own if name.startswith(_head(model))}
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = sorted(own.keys() - fitting.keys() - head)
    if missing:
        raise ArgumentError(
            f"--weights {options.weights} does not fit {options.model}: {missing[0]} is missing or "
            "has another shape"
        )
    if unknown := sorted(state.keys() - own.keys()):
        raise ArgumentError(
            f"--weights {options.weights} is of another model: it has {unknown[0]}, which "
            f"{options.model} does not have"
        )
    model.load_state_dict({**own, **fitting})
    return model, head <= fitting.keys()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _head(model: Any) -> str:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return f"{classifier if isinstance(classifier, str) else 'head'}."
