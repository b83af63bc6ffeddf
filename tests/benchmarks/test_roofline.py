"""Least work: products against torch's own counter, bytes against sums written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from made_up import CEILINGS, row
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.case import Case
from benchmarks.roofline import (
    attention_cost,
    forward_cost,
    linear_cost,
    measure_ceilings,
    model_cost,
    percent_of_floor,
    row_cost,
)

B, H, N, D = 2, 3, 16, 8
CASE = Case("attention-forward", "attention", (B, H, N, D), "fp32")


def primal(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p, p @ v


def dual(q, k, v, q_t, k_t, v_t):
    p, o = primal(q, k, v)
    s_t = q_t @ k.mT + q @ k_t.mT
    p_t = p * (s_t - (p * s_t).sum(-1, keepdim=True))
    return o, p_t @ v + p @ v_t


def backward(q, k, v, h):
    """As a flash kernel does: the scores once more, nothing N x N kept."""
    p = (q @ k.mT).softmax(-1)
    a = h @ v.mT
    grad_s = p * (a - (p * a).sum(-1, keepdim=True))
    return grad_s @ k, grad_s.mT @ q, p.mT @ h


def dual_backward(q, k, v, q_t, k_t, v_t, g, h):
    """DESIGN's formulas: gradients of tangents, then of primals."""
    p, s_t = (q @ k.mT).softmax(-1), q_t @ k.mT + q @ k_t.mT
    centred = s_t - (p * s_t).sum(-1, keepdim=True)
    a, b = h @ v.mT, g @ v.mT + h @ v_t.mT
    row_a = (p * a).sum(-1, keepdim=True)
    grad_s_t = p * (a - row_a)
    inner = b + a * centred - row_a * s_t
    grad_s = p * (inner - (p * inner).sum(-1, keepdim=True))
    p_t = p * centred
    of_tangents = (grad_s_t @ k, grad_s_t.mT @ q, p.mT @ h)
    grad_q, grad_k = grad_s @ k + grad_s_t @ k_t, grad_s.mT @ q + grad_s_t.mT @ q_t
    return *of_tangents, grad_q, grad_k, p.mT @ g + p_t.mT @ h


FORMULAS = {
    ("forward", "primal"): (primal, 3),
    ("forward", "tangent"): (dual, 6),
    ("forward", "finite-differences"): (lambda *x: (primal(*x[:3]), primal(*x[3:])), 6),
    ("backward", "primal"): (backward, 4),
    ("backward", "tangent"): (backward, 4),
    ("second-order", "primal"): (backward, 4),
    ("second-order", "tangent"): (dual_backward, 8),
}
PASSES = [  # of a layer or a model
    *(("forward", "primal"), ("forward", "tangent"), ("forward", "finite-differences")),
    *(("step", "primal"), ("step", "tangent")),
]


def counted(call, *operands) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*operands)
    return counter.get_total_flops()


@pytest.mark.parametrize("question", FORMULAS)
def test_attention_flops(question) -> None:
    formula, operands = FORMULAS[question]
    expected = counted(formula, *torch.randn(operands, B, H, N, D).unbind(0))
    assert attention_cost(*question, (B, H, N, D), 4).flops == expected


def test_the_written_out_backward_is_the_gradient() -> None:
    """The formulas that are counted are the right ones."""
    q, k, v, q_t, k_t, v_t, g, h = torch.randn(8, 1, 1, 5, 3, dtype=torch.float64).unbind(0)
    leaves = [x.clone().requires_grad_() for x in (q_t, k_t, v_t, q, k, v)]
    outputs = dual(*leaves[3:], *leaves[:3])
    expected = torch.autograd.grad(outputs, leaves, (g, h))
    torch.testing.assert_close(dual_backward(q, k, v, q_t, k_t, v_t, g, h), expected)
    torch.testing.assert_close(backward(q, k, v, h), expected[:3])


def test_attention_bytes() -> None:
    """2 x 3 heads of 16 tokens, 8 wide: tensors of 768 elements, statistics of 96 floats."""
    tensor, statistic = 768 * 2, 96 * 4
    expected = {
        ("forward", "primal"): 4 * tensor,  # q k v, o
        ("forward", "tangent"): 8 * tensor,
        ("forward", "finite-differences"): 8 * tensor,
        ("backward", "primal"): 8 * tensor + statistic,  # q k v o do, dq dk dv; lse
        ("backward", "tangent"): 8 * tensor + statistic,
        ("second-order", "primal"): 8 * tensor + statistic,
        ("second-order", "tangent"): 16 * tensor + 2 * statistic,
    }
    found = {name: attention_cost(*name, (B, H, N, D), 2).bytes for name in expected}
    assert found == expected


@pytest.mark.parametrize("question", FORMULAS)
def test_causal_counts_the_pairs_that_are_seen(question) -> None:
    pairs = int(torch.ones(N, N).tril().sum())
    full = attention_cost(*question, (B, H, N, D), 2)
    causal = attention_cost(*question, (B, H, N, D), 2, causal=True)
    assert causal.flops == pytest.approx(full.flops * pairs / N**2)
    assert causal.bytes == full.bytes


def test_linear() -> None:
    """Rows 7, 5 wide to 3: x 35, W 15, b 3, y 21 elements of 4 bytes."""
    x, w, b = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)

    def step(tangents: bool) -> None:
        leaves = [one.clone().requires_grad_() for one in (x, w, b)]
        if tangents:
            torch.nn.functional.linear(x, w, b)
            y = leaves[0] @ w.T + x @ leaves[1].T + leaves[2]
        else:
            y = torch.nn.functional.linear(*leaves)
        y.sum().backward()

    product = counted(torch.nn.functional.linear, x, w, b)
    costs = {name: linear_cost(*name, 7, 5, 3, 4) for name in PASSES}
    assert [cost.flops / product for cost in costs.values()] == [1, 3, 2, 3, 5]
    assert costs["step", "primal"].flops == counted(step, False)
    assert costs["step", "tangent"].flops == counted(step, True)
    forward = 4 * (35 + 15 + 3 + 21)
    backward = 4 * (35 + 15 + 21 + 35 + 15 + 3)  # x W dy; dx dW db
    expected = [forward, 2 * forward, 2 * forward, forward + backward, 2 * forward + backward]
    assert [cost.bytes for cost in costs.values()] == expected


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("layer_norm", 2 * (7 * 5 * 2 + 5 * 2), 2 * (3 * 7 * 5 + 3 * 5) + 2 * 7 * 4),
        ("rms_norm", 2 * (7 * 5 * 2 + 5), 2 * (3 * 7 * 5 + 2 * 5) + 7 * 4),
        ("gelu", 2 * 7 * 5 * 2, 2 * 7 * 5 * 3),
    ],
)
def test_elementwise(op, forward, backward) -> None:
    cost = partial(row_cost, op)
    assert cost("forward", "primal", 7, 5, 2).bytes == forward
    assert cost("forward", "tangent", 7, 5, 2).bytes == 2 * forward
    assert cost("step", "primal", 7, 5, 2).bytes == forward + backward
    assert cost("step", "tangent", 7, 5, 2).bytes == 2 * forward + backward
    assert cost("forward", "tangent", 7, 5, 2).flops > cost("forward", "primal", 7, 5, 2).flops > 0


def test_vit() -> None:
    """Against the products of a ViT written out, and of a real forward pass by matmuls."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    batch, tokens, width, classes = 2, 17, 192, 1000
    block = 2 * tokens * width * 12 * width + 2 * 2 * tokens**2 * width
    flops = batch * (2 * block + 2 * 16 * 768 * width + 2 * width * classes)
    forward = forward_cost(model, (batch, 3, 64, 64))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (forward.flops, forward.bytes) == (flops, weights)
    ratios = dict(zip(PASSES, [(1, 1), (3, 2), (2, 2), (3, 3), (5, 4)], strict=True))
    for question, (operations, moved) in ratios.items():
        cost = model_cost(*question, forward)
        assert (cost.flops, cost.bytes) == (operations * flops, moved * weights), question


@pytest.mark.parametrize(
    "ask",
    [
        lambda: attention_cost("forward", "third", (B, H, N, D), 4),
        lambda: linear_cost("third", "primal", 1, 1, 1, 4),
        lambda: row_cost("gelu", "forward", "third", 1, 1, 4),
        lambda: row_cost("third", "forward", "tangent", 1, 1, 4),
    ],
)
def test_unknown_questions(ask) -> None:
    with pytest.raises(KeyError, match="third"):
        ask()


@pytest.mark.parametrize(
    ("seconds", "flops", "moved", "ceilings", "percent"),
    [
        (0.02, 1e9, 4e7, CEILINGS, 50),  # 10 ms of arithmetic, 4 ms of memory
        (0.1, 1e9, 2e8, CEILINGS, 20),  # 10 and 20 ms
        (None, 1e9, 2e8, CEILINGS, None),
        (0.1, 1e9, 2e8, {"bytes/s": 1e10}, None),
        (0.1, 1e9, 2e8, {}, None),
    ],
)
def test_percent_of_floor(seconds, flops, moved, ceilings, percent) -> None:
    found = percent_of_floor(row(CASE, "ours", seconds, flops=flops, bytes=moved), ceilings)
    assert found == (None if percent is None else pytest.approx(percent))


def test_ceilings(monkeypatch) -> None:
    """What is measured, with a clock of our own: one call takes 10 ms."""
    calls = []

    def best(call):
        calls.append(call)
        return 0.01

    monkeypatch.setattr(roofline, "_best", best)
    found = measure_ceilings(torch.device("cpu"))
    assert list(found) == ["bytes/s", "flops/s fp32", "flops/s bf16"]
    assert found["bytes/s"] == 2 * 2**28 / 0.01
    flops = [counted(call) / 0.01 for call in calls[1:]]
    assert [found["flops/s fp32"], found["flops/s bf16"]] == flops


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    found = measure_ceilings(torch.device("cuda"))
    assert set(found) == {"bytes/s", "flops/s fp32", "flops/s bf16", "flops/s fp16"}
    assert found["flops/s bf16"] > found["flops/s fp32"] > 1e12 > found["bytes/s"] / 100
