"""An unmodified timm ViT through the Triton kernels, end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import tiny_vit
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import tangent_ops
from tests.ops import oracle


def jvp_of_parameters(model, parameters, tangents, x):
    return torch.func.jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_vit_and_the_gradient_of_its_tangents(compiled, device) -> None:
    torch._dynamo.reset()
    model = tiny_vit(img_size=8, embed_dim=16, num_heads=2)
    model = model.eval().requires_grad_(False).to(device)
    parameters = dict(model.named_parameters())
    tangents = {n: (0.1 * torch.randn_like(p)).requires_grad_() for n, p in parameters.items()}
    x = torch.randn(1, 3, 8, 8, device=device)

    def run(*args):
        with tangent_ops.fused_forward_ad(backend="triton"):
            return jvp_of_parameters(*args)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = run(model, parameters, tangents, x)
    grads = torch.autograd.grad(found[1].sin().sum(), list(tangents.values()))

    right = {n: t.detach().double().requires_grad_() for n, t in tangents.items()}
    with sdpa_kernel(SDPBackend.MATH):
        exact = jvp_of_parameters(
            copy.deepcopy(model).double(), oracle.double(parameters), right, x.double()
        )
    exact_grads = torch.autograd.grad(exact[1].sin().sum(), list(right.values()))
    for one, other in zip((*found, *grads), (*exact, *exact_grads), strict=True):
        assert oracle.error(one, other) <= 1e-5 * float(other.detach().norm()) + 1e-6


@pytest.mark.gpu
def test_a_linearized_model_chooses_the_kernels_on_a_gpu(launched) -> None:
    tangent = tangent_ops.linearize(tiny_vit(embed_dim=48)).cuda()
    tangent(torch.randn(2, 3, 16, 16, device="cuda"))
    # The trained block; before it, the check of derivatives calls the kernels on one sample.
    assert launched[-1] == [1, (2, 3, 17, 16)]
