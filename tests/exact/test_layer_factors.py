"""Layer factors and explicit rows of J against rows by one backward pass each, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Computes, family, generator, swin, vit
from torch import Tensor, nn

from tangent_ops import LinearizedModel, last_blocks, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.extract import Extractor
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.parts import Factors, Rows
from tangent_ops.exact.stored import Stored
from tangent_ops.ops.linear import head_linear


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def assert_is_j(tangent: LinearizedModel, inputs: Tensor, stored: Stored, other: Stored) -> None:
    """All products are those with explicit rows; `other` is of inputs[:2]."""
    jacobian = Jacobian(tangent)
    rows = torch.stack([jacobian.rows(one) for one in inputs.split(1)])  # (N, C, P)
    n, c, p = rows.shape
    flat = rows.flatten(0, 1)
    scale = float(flat.square().sum(1).max())

    def near(found: Tensor, exact: Tensor, size: float) -> None:
        assert float((found - exact).abs().max()) <= 1e-10 * size

    near(stored.logits.view(n, c), jacobian.outputs(None, inputs)[0].view(n, c), 1.0)
    near(stored.gram(stored), flat @ flat.T, scale)
    near(stored.gram(other), flat @ rows[:2].flatten(0, 1).T, scale)
    near(stored.own(), rows @ rows.mT, scale)
    vectors, weights = noise(3, p), noise(3, n, c, seed=1)
    near(stored.jvp(vectors), (vectors @ flat.T).view(3, n, c), p * scale**0.5)
    total = torch.ones(3, p, dtype=torch.float64)
    stored.add_vjp(weights, total)
    near(total, 1 + weights.flatten(1) @ flat, n * c * scale**0.5)


MODELS = {
    "vit": (lambda: vit(), None),
    "vit's last block": (lambda: vit(), 1),
    "average pooling": (lambda: vit(class_token=False, global_pool="avg"), 1),
    "map pooling": (lambda: vit(class_token=False, global_pool="map"), 1),
    "qk norm, no bias": (lambda: vit(qk_norm=True, qkv_bias=False), 1),
    "swin": (swin, None),
    "eva": (lambda: family("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=24,
                           num_heads=2), None),
    "beit": (lambda: family("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24,
                            num_heads=2), None),
    "convnext": (lambda: family("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), None),
}  # fmt: skip
SIZES = {"eva": 28, "beit": 32, "swin": 32, "convnext": 32}


@pytest.mark.parametrize("explicit", [False, True], ids=["factors", "rows"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_j_of_models(kind: str, explicit: bool) -> None:
    make, depth = MODELS[kind]
    model = make().double().eval()
    tangent = linearize(model, None if depth is None else last_blocks(model, depth), check=False)
    size = SIZES.get(kind, 16)
    inputs = noise(3, 3, size, size)
    extractor = Extractor(tangent, inputs, explicit=explicit)
    extractor.check(inputs)
    stored = extractor(inputs)
    assert_is_j(tangent, inputs, stored, extractor(inputs[:2]))
    assert explicit == all(isinstance(part, Rows) for part in stored.parts)
    alone = Stored.joined([extractor.alone(one) for one in inputs.split(1)])
    assert_is_j(tangent, inputs, alone, extractor(inputs[:2]))
    counted, work = extractor.bytes_per_sample, sum(part.work for part in stored.parts)
    assert 0.8 * stored.nbytes <= len(inputs) * counted <= 1.3 * stored.nbytes + 1000
    assert 0.8 * work <= len(inputs) * extractor.work_per_sample <= 1.3 * work + 1000


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_it_is_j_of_layers(data: st.DataObject) -> None:
    """Linear maps with and without bias, of all positions or one, some of them frozen or shared."""
    n, t, heads = (data.draw(st.integers(1, 4)) for _ in range(3))
    k, c, head = (data.draw(st.integers(1, 6)) for _ in range(3))
    o = data.draw(st.integers(2, 6))  # the derivatives by a norm of one feature are rounding alone
    bias, twice, one = (data.draw(st.booleans()) for _ in range(3))
    kind = data.draw(st.sampled_from([{}, {"rank": 1}, {"rank": 2}, {"core": 1}, {"core": (2, 1)}]))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    def call(own: Any, x: Tensor) -> Tensor:
        y = own.first(x).tanh()
        y = y + own.first(x.flip(1)).sin() if twice else y
        y = y[:, :1] if one else y
        rows = own.rows.weight  # the first o of them as one map, the others one to each head
        z = F.linear(y, rows[:o], own.rows.bias[:o] if bias else None).tanh()
        per_head = z.unsqueeze(-2).expand(*z.shape[:-1], heads, o)
        weight = rows[o:].view(heads, head, o)
        z = head_linear(per_head, weight, own.rows.bias[o:].view(heads, head) if bias else None)
        back = head_linear(z.tanh(), weight2(own).mT)  # W of each head, transposed
        return own.head(own.norm(back.sum(-2)) * own.scale).mean(1)

    def weight2(own: Any) -> Tensor:
        return own.keys.weight.view(heads, head, o)

    model = Computes(
        call,
        first=nn.Linear(k, o, bias=bias),
        rows=nn.Linear(o, o + heads * head, bias=bias),
        keys=nn.Linear(o, heads * head, bias=False),
        norm=nn.LayerNorm(o),
        scale=nn.Parameter(torch.randn(o)),
        head=nn.Linear(o, c),
    ).double()
    frozen = data.draw(st.sampled_from(["nothing", "first", "bias", "keys"]))
    tangent = linearize(model, lambda name: frozen not in name, check=False, **kind)
    inputs = noise(n, t, k)
    extractor = Extractor(tangent, inputs)
    extractor.check(inputs)
    assert_is_j(tangent, inputs, extractor(inputs), extractor(inputs[:2]))
    alone = Stored.joined([extractor.alone(one) for one in inputs.split(1)])
    assert_is_j(tangent, inputs, alone, extractor(inputs[:2]))


def test_models_of_tokens_keep_factors_of_one_row() -> None:
    tangent = linearize(timm.create_model("vit_tiny_patch16_224", num_classes=3), r"^head\.")
    stored = Extractor(tangent, torch.randn(2, 3, 224, 224))(torch.randn(2, 3, 224, 224))
    (head,) = stored.parts
    assert isinstance(head, Factors) and head.inputs.shape == (2, 1, 1, 192)


def test_a_weight_that_is_also_used_elsewhere() -> None:
    """The factors of the layer lack a part, which the comparison finds."""

    def call(own: Any, x: Tensor) -> Tensor:
        return own.head(own.first(x).tanh()) + own.first.weight.sum()

    model = Computes(call, first=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    tangent = linearize(model)
    inputs = noise(5, 3)
    extractor = Extractor(tangent, inputs)
    extractor.check(inputs)
    assert_is_j(tangent, inputs, extractor(inputs), extractor(inputs[:2]))


def test_changes_in_place() -> None:
    def call(own: Computes, x: Tensor) -> Tensor:
        y = own.first(x)
        y.mul_(2).sigmoid_()
        return own.head(y)

    model = Computes(call, first=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    tangent, inputs = linearize(model), noise(5, 3)
    extractor = Extractor(tangent, inputs)
    extractor.check(inputs)
    assert_is_j(tangent, inputs, extractor(inputs), extractor(inputs[:2]))


def test_samples_that_mix_are_refused() -> None:
    model = Computes(
        lambda own, x: own.head(x).tanh().diff(dim=0, append=x[:1, :2]), head=nn.Linear(3, 2)
    ).double()
    with pytest.raises(UnsupportedError, match="mixes samples"):
        Extractor(linearize(model, check=False), noise(5, 3)).check(noise(5, 3))


@pytest.mark.parametrize("size", [2, (6, 3)])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "qkv_bias": False}], ids=["", "qk norm"])
def test_a_core_that_queries_keys_and_values_share_needs_no_pass_for_each_sample(
    size: int | tuple[int, int], options: dict[str, Any]
) -> None:
    tangent = linearize(vit(**options).double(), last_blocks(vit(), 1), core=size, check=False)
    trunk, tail = tangent.split()
    tokens = trunk(noise(3, 3, 16, 16))
    extractor = Extractor(tail, tokens)
    extractor.check(tokens)
    assert not extractor._slow and not any(name.endswith("qkv") for name in extractor._modules)
    assert_is_j(tail, tokens, extractor(tokens), extractor(tokens[:2]))
    alone = Stored.joined([extractor.alone(one) for one in tokens.split(1)])
    assert_is_j(tail, tokens, alone, extractor(tokens[:2]))
