"""Exported programs and task vectors, against the tangent model and PyTorch's own JVP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import Computes, exact_jvp, family, generator, moved, vit
from torch import nn

from tangent_ops import last_blocks, linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.export import export_program, save_task_vector, task_vector


def exact(tangent, images):
    """f + J Δw by torch.func.jvp in float64."""
    return sum(exact_jvp(tangent.anchor, dict(tangent.full_delta_dict()), images))


@pytest.mark.parametrize(("rank", "blocks"), [(None, 3), (2, 1)])
def test_a_program_gives_what_the_model_gives(rank, blocks, tmp_path: Path) -> None:
    model = vit().double()
    tangent = moved(linearize(model, last_blocks(model, blocks), rank=rank))
    before = {name: delta.clone() for name, delta in tangent.deltas().items()}
    export_program(tangent, tmp_path / "model.pt2", input_size=(3, 16, 16))
    program = torch.export.load(tmp_path / "model.pt2")
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in operators)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 16, 16, dtype=torch.float64, generator=generator(batch))
        found = program.module()(images)
        torch.testing.assert_close(found, exact(tangent, images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], delta) for name, delta in tangent.deltas().items())
    assert all(delta.requires_grad for delta in tangent.deltas().values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_convolutional_model(tmp_path: Path) -> None:
    tangent = moved(linearize(family("test_convnext"), r"^(stages\.3|head)\."))
    export_program(tangent, tmp_path / "model.pt2", input_size=(3, 32, 32))
    images = torch.randn(3, 3, 32, 32, generator=generator())
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found.double(), exact(tangent, images), rtol=1e-4, atol=1e-4)


def _arithmetic(model, x):
    h = model.first(x)
    h = 2 * h / 3.0 + 1 - (h - torch.arange(8.0, dtype=x.dtype)) * x[:, :, ::2]
    return model.head(1 - h / (h.abs() + 2.0))


def _attention_with_weights(model, x):
    """One query of all tokens, as SigLIP's pooling head has it."""
    mixed, weights = model.mix(x[:, :1], model.first(x), x)
    return model.head(mixed[:, 0]) + weights[:, 0, :1]


@pytest.mark.parametrize(
    ("compute", "layers"),
    [
        (
            lambda m, x: _arithmetic(m, x).mean(1),
            {"first": nn.Linear(16, 8), "head": nn.Linear(8, 3)},
        ),
        (
            _attention_with_weights,
            {
                "first": nn.Linear(16, 16),
                "mix": nn.MultiheadAttention(16, 2, batch_first=True),
                "head": nn.Linear(16, 3),
            },
        ),
    ],
    ids=["arithmetic", "attention"],
)
def test_the_batch_size_stays_dynamic(compute, layers, tmp_path: Path) -> None:
    """PyTorch's rules fix it where one operand alone has a tangent."""
    tangent = moved(linearize(Computes(compute, **layers).double().eval()))
    export_program(tangent, tmp_path / "model.pt2", input_size=(2, 16))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 4):
        x = torch.randn(batch, 2, 16, dtype=torch.float64, generator=generator(batch))
        torch.testing.assert_close(program(x), exact(tangent, x), rtol=1e-10, atol=1e-10)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    tangent = linearize(vit(depth=1))
    target = tmp_path / "model.pt2"
    target.write_bytes(b"older")
    with pytest.raises(ArgumentError, match="input_size"):
        export_program(tangent, target, input_size=(3, 0, 16))
    with pytest.raises(UnsupportedError, match="cannot trace"):
        export_program(tangent, target, input_size=(3, 17, 16))
    for path in (tmp_path, tmp_path / "none" / "model.pt2"):
        with pytest.raises(ArgumentError, match="folder"):
            export_program(tangent, path, input_size=(3, 16, 16))
        with pytest.raises(ArgumentError, match="folder"):
            save_task_vector(tangent, path)
    assert target.read_bytes() == b"older"


def test_a_batch_size_that_is_fixed_is_refused(tmp_path: Path) -> None:
    fixed = Computes(lambda m, x: m.head(x).view(2, 2), head=torch.nn.Linear(4, 2))
    with pytest.raises(UnsupportedError):
        export_program(linearize(fixed), tmp_path / "model.pt2", input_size=(4,))


def test_a_task_vector_is_plain_and_full(tmp_path: Path) -> None:
    tangent = moved(linearize(vit(), rank=2))
    save_task_vector(tangent, tmp_path / "task.safetensors")
    found = load_file(tmp_path / "task.safetensors")
    parameters = dict(tangent.anchor.named_parameters())
    assert found.keys() == task_vector(tangent).keys() == tangent.deltas().keys()
    bases = tangent.basis.tensors()
    for name, value in found.items():
        assert value.shape == parameters[name].shape
        delta = tangent.deltas()[name].detach()
        expected = (delta.double() @ bases[name].double()) if name in bases else delta.double()
        torch.testing.assert_close(value.double(), expected.view(value.shape), rtol=1e-5, atol=1e-6)
