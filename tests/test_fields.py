"""Fields of a batch that a model does not read are refused, wherever data go in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hugging_face import Samples, made, samples

from tangent_ops import core_basis, fit, fit_head, last_blocks, linearize, predict
from tangent_ops.errors import ArgumentError
from tangent_ops.exact import Problem


@pytest.mark.parametrize(
    "use",
    [
        lambda model, data: fit(model, data, progress=False),
        lambda model, data: fit(linearize(model), data, progress=False),
        lambda model, data: fit(
            linearize(model, last_blocks(model, 1)), data, cache=True, progress=False
        ),
        lambda model, data: fit_head(model, data, progress=False),
        lambda model, data: Problem(linearize(model), data, 0.1, cache=False).passes.gradient(),
        lambda model, data: predict(linearize(model), data),
        core_basis,
    ],
    ids=["model", "tangent", "cached", "head", "problem", "predict", "basis"],
)
def test_a_field_that_the_model_does_not_read_is_refused(use: Any) -> None:
    """Their models take any name, in ``**kwargs``, and would compute without it."""
    fields = samples("vit", 4).fields
    other = Samples({**fields, "pixel_mask": torch.ones(4, 2)})
    with pytest.raises(ArgumentError, match=r"the field 'pixel_mask' .*: it takes pixel_values, "):
        use(made("vit"), other)
