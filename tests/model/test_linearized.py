"""LinearizedModel: its deltas, state, copies, fingerprint and texts."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from small_models import Mlp, family, images, moved, vit

from tangent_ops import Delta, last_blocks, linearize
from tangent_ops.errors import DeltaError


def test_delta_dict_round_trip():
    model, x = vit(), images()
    one, two = moved(linearize(model, "head|norm")), linearize(model, "head|norm")
    taken = one.delta_dict()
    assert isinstance(taken, Delta) and taken.meta is not None
    assert taken.meta.anchor == one.fingerprint == two.fingerprint
    assert (taken.meta.model, taken.meta.trainable) == ("VisionTransformer", "head|norm")
    assert not any(value.requires_grad for value in taken.values())
    held = two.deltas()["head.bias"]
    two.load_delta_dict(taken)
    assert torch.equal(one(x), two(x))
    assert two.deltas()["head.bias"] is held  # in place: an optimizer keeps it

    before = one(x)
    for value in taken.values():
        value.zero_()
    assert torch.equal(one(x), before)  # a copy


def test_model_name_of_timm():
    model = family("test_resnet")
    assert linearize(model).model_name == "test_resnet"


def test_load_delta_dict_refuses_and_changes_nothing():
    tangent = moved(linearize(Mlp()))
    good = tangent.delta_dict()
    other = Mlp()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    wrong_anchor = moved(linearize(other), seed=20).delta_dict()

    def changed(**tensors):
        return {**{n: d + 1 for n, d in good.items()}, **tensors}

    broken = torch.zeros(3)
    broken[1] = float("nan")
    without = changed()
    del without["head.bias"]
    cases = [
        (wrong_anchor, "belongs to another anchor"),
        (without, r"missing head\.bias"),
        (changed(extra=torch.zeros(1)), "unexpected extra"),
        (changed(**{"head.bias": torch.zeros(4)}), r"head\.bias has shape \(4,\), expected \(3,\)"),
        (changed(**{"head.bias": broken}), r"not finite in head\.bias"),
        (changed(**{"head.bias": 3}), "to a int, not to a tensor"),
    ]
    for delta, message in cases:
        with pytest.raises(DeltaError, match=message):
            tangent.load_delta_dict(delta)
        assert all(torch.equal(d, good[n]) for n, d in tangent.deltas().items())
    tangent.load_delta_dict(dict(wrong_anchor))  # nothing known of its anchor
    assert torch.equal(tangent.deltas()["head.bias"], wrong_anchor["head.bias"])


def test_state_dict_has_anchor_and_deltas():
    model = vit()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    names = {f"delta.{n}" for n in tangent.deltas()} | {f"anchor.{n}" for n in model.state_dict()}
    assert tangent.state_dict().keys() == names
    assert {n for n, p in tangent.named_parameters() if p.requires_grad} == {
        n for n in names if n.startswith("delta.")
    }
    other = linearize(vit(num_classes=5, init_values=0.5), last_blocks(model, 1))
    stale = other.fingerprint
    other.load_state_dict(tangent.state_dict())
    assert torch.equal(other(images()), tangent(images()))
    assert other.fingerprint == tangent.fingerprint != stale


def saved_and_loaded(tangent):
    file = io.BytesIO()
    torch.save(tangent, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), saved_and_loaded]
)
def test_copies_and_files_of_a_tangent_model(through):
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    twin = through(tangent)
    assert torch.equal(twin(x), tangent(x))
    assert twin.fingerprint == tangent.fingerprint
    assert twin.trainable == tangent.trainable
    before = tangent(x)
    with torch.no_grad():
        twin.deltas()["head.bias"].add_(1)
        twin.anchor.head.bias.add_(1)
    assert torch.equal(tangent(x), before)
    assert not torch.equal(twin(x), before)


def test_fingerprint_is_the_anchors_content():
    model = Mlp()
    fingerprint = linearize(model).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert linearize(copy.deepcopy(model), "head").fingerprint == fingerprint
    assert moved(linearize(model)).fingerprint == fingerprint  # deltas are not part of it

    code = "from small_models import Mlp; from tangent_ops import linearize; "
    code += "print(linearize(Mlp()).fingerprint)"
    fresh = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == fingerprint

    bits = model.head.bias.data.view(torch.int32)
    bits[0] ^= 1
    assert linearize(model).fingerprint != fingerprint
    bits[0] ^= 1
    assert linearize(model).fingerprint == fingerprint


def test_fingerprint_follows_a_change_of_dtype():
    tangent = linearize(Mlp())
    single = tangent.fingerprint
    assert tangent.double().fingerprint == linearize(Mlp().double()).fingerprint != single


def test_summary_adds_up(capsys):
    model = vit()
    linearize(model, last_blocks(model, 1)).summary()
    printed = capsys.readouterr().out
    assert "VisionTransformer" in printed and last_blocks(model, 1) in printed
    table = {}
    for line in printed.splitlines()[2:]:
        group, *numbers = line.split()
        table[group] = [int(number.replace(",", "")) for number in numbers]
    total = table.pop("total")
    assert total == [sum(column) for column in zip(*table.values(), strict=True)]
    assert sum(total) == sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[2].parameters())
    assert table["blocks.2"] == [block, 0] and table["blocks.1"] == [0, block]
    head = sum(p.numel() for p in model.head.parameters())
    norm = sum(p.numel() for p in model.norm.parameters())
    assert total[0] == block + head + norm


def test_zero_makes_the_model_its_anchor_again():
    tangent, x = moved(linearize(vit(), "blocks")), images()
    fresh = linearize(tangent.anchor, "blocks")(x)
    assert not torch.equal(tangent(x), fresh)
    assert tangent.zero_() is tangent
    assert torch.equal(tangent(x), fresh)
    assert not any(delta.count_nonzero() for delta in tangent.deltas().values())


def test_repr_says_in_a_line_what_is_trained():
    tangent = linearize(vit(), "head", rank=2)
    assert repr(tangent).startswith("LinearizedModel(VisionTransformer, trainable='head', rank=2: ")
    assert repr(tangent.delta_dict()).startswith("Delta(2 tensors, ")
    assert "\n" not in repr(tangent) + repr(tangent.delta_dict())
    assert repr(Delta({"w": torch.ones(3)})) == "Delta(1 tensors, 3 values: no meta)"
