"""All sides of a profile compute the same function and train the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import assert_near
from torch.overrides import TorchFunctionMode

from tangent_ops.profiling.sides import OURS, RIVALS, Settings, build, create

MODEL = "test_vit"


def settings(**changes: Any) -> Settings:
    options = {"model": MODEL, "batch": 2, "dtype": "fp32", "mode": "forward", "device": "cpu"}
    return Settings(**{**options, "against": RIVALS, "out": Path("unused"), **changes})


def test_ours_and_torch_jvp_agree() -> None:
    ours, theirs = (build(name, settings())() for name in (OURS, "torch-jvp"))
    assert_near(ours, theirs)
    assert not ours.requires_grad and not theirs.requires_grad


def test_finetune_is_the_model_without_a_tangent() -> None:
    output = build("finetune", settings())()
    assert output.shape == (2, 1000)
    ours = build(OURS, settings())()
    assert float((output - ours).abs().max()) > 1e-3  # the deltas are not zero


@pytest.mark.parametrize("blocks", [None, 1])
def test_all_sides_train_the_same_parameters(blocks: int | None) -> None:
    model = create(MODEL)
    names = [n for n, _ in model.named_parameters()]
    if blocks is not None:
        last = f"blocks.{len(model.blocks) - 1}."
        names = [n for n in names if n.startswith((last, "norm.", "fc_norm.", "head."))]
    expected = sorted(model.get_parameter(n).numel() for n in names)
    for name in (OURS, *RIVALS):
        step = build(name, settings(mode="train", blocks=blocks))
        trained = [p for p in step.args[1] if p.requires_grad]  # pyright: ignore
        assert sorted(p.numel() for p in trained) == expected, name


def test_torch_jvp_computes_no_gradient_of_what_is_frozen() -> None:
    step: Any = build("torch-jvp", settings(mode="train", blocks=1))
    step()
    model = step.args[0].args[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [OURS, *RIVALS])
def test_a_training_step_leaves_no_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = build(name, settings(mode="train"))
    seen = []
    backward = torch.Tensor.backward

    def spy(loss: torch.Tensor) -> None:
        backward(loss)
        seen.extend(p.grad.abs().sum() > 0 for p in step.args[1])

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    step()
    assert seen and any(seen)
    assert all(p.grad is None for p in step.args[1])


def test_torch_jvp_in_16_bits() -> None:
    ours, theirs = (build(name, settings(dtype="bf16"))() for name in (OURS, "torch-jvp"))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_near(ours, theirs.double(), 0.1)  # 2^-8, a few times, on both sides


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_dtype_is_that_of_everything(name: str, dtype: torch.dtype) -> None:
    class Dtypes(TorchFunctionMode):
        found: set[torch.dtype] = set()  # noqa: RUF012

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.found |= {x.dtype for x in args if type(x) is torch.Tensor}
            return func(*args, **(kwargs or {}))

    step = build("finetune", settings(dtype=name))
    with Dtypes() as mode:
        assert step().dtype == dtype
    assert mode.found == {dtype}
