"""What a linear probe takes of a timm model: the features before its classifier, and that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, UnsupportedError


class PreLogits(nn.Module):
    """What a timm model feeds its classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(inputs), pre_logits=True)


def zero_head(model: Any, num_classes: int | None) -> nn.Linear:
    """Reset the model's classifier, if num_classes is given, and set it to zeros.

    Raises:
        ArgumentError: there is no classifier.
        UnsupportedError: not a timm model, or its classifier is not one linear layer.
    """
    needed = ("forward_features", "forward_head", "get_classifier", "reset_classifier")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        kind = type(model).__name__
        raise UnsupportedError(f"fit_head needs a timm model; this {kind} lacks {missing}")
    if num_classes is not None:
        model.reset_classifier(num_classes)
    head = model.get_classifier()
    if isinstance(head, nn.Identity):
        raise ArgumentError("model has no classifier: pass num_classes")
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise UnsupportedError(f"fit_head needs one nn.Linear as classifier, this is a {kind}")
    for parameter in head.parameters():
        nn.init.zeros_(parameter.requires_grad_())
    return head
