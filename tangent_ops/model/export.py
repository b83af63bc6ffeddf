"""Exports a tangent model as a program of plain PyTorch, or as a task vector."""

from __future__ import annotations

import copy
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.family import logits_of
from tangent_ops.files import check_target, write_atomically, write_safetensors
from tangent_ops.model.dual_call import plain_dual_output
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.forward_ad import fused_calls
from tangent_ops.ops.levels import in_own_level
from tangent_ops.ops.reference.attention import attention, attention_jvp


def export_program(
    tangent: LinearizedModel, path: str | os.PathLike[str], *, input_size: Sequence[int]
) -> None:
    """Write f(x; w0) + J(x) Δw, with the present deltas, as a program of PyTorch's own operators.

    ``torch.export.load(path).module()(images)`` runs it, without this library and without timm. It
    costs one dual forward pass, however many deltas were composed.

    Args:
        tangent: a model with one input tensor, of which the program returns the logits; it does
            not change. The program runs on the CPU;
            ``torch.export.passes.move_to_device_pass`` moves it.
        path: the file, which is overwritten completely or not at all; ``.pt2`` by convention.
        input_size: size of one input, such as (3, 224, 224). The batch size stays dynamic.

    Raises:
        ArgumentError: path is a folder or its folder does not exist; input_size holds something
            else than positive integers.
        UnsupportedError: the model cannot be exported, or not with a dynamic batch size.
        OSError: the file cannot be written.
    """
    path = Path(path).absolute()
    check_target(path)
    if not input_size or not all(type(size) is int and size > 0 for size in input_size):
        raise ArgumentError(f"input_size must be positive integers, got {input_size!r}")
    program = _exported(tangent, tuple(input_size))
    ours = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and not str(node.target).startswith(("aten.", "<built-in"))
    }  # built-in functions compute sizes
    if ours:
        raise UnsupportedError(
            f"the model uses {min(ours)}, which plain PyTorch does not have: it cannot be exported"
        )
    _check(program, tangent, tuple(input_size))
    written = io.BytesIO()  # PyTorch's writer ends the process where a disk is full
    torch.export.save(program, written)
    write_atomically(path, lambda file: file.writelines([written.getbuffer()]))


def task_vector(tangent: LinearizedModel) -> dict[str, Tensor]:
    """The full Δw: name -> tensor shaped as the anchor's parameter; low-rank factors multiplied.

    For tools that add task vectors. The *ordinary* model at w0 + Δw is not the tangent model, whose
    output is linear in Δw: the two differ in second order.
    """
    return dict(tangent.full_delta_dict())


def save_task_vector(tangent: LinearizedModel, path: str | os.PathLike[str]) -> None:
    """Write `task_vector` as a plain safetensors file, completely or not at all.

    Raises:
        ArgumentError: path is a folder or its folder does not exist.
        OSError: the file cannot be written.
    """
    path = Path(path).absolute()
    check_target(path)
    tensors = task_vector(tangent)
    write_atomically(path, lambda file: write_safetensors(file, tensors, {"format": "pt"}))


_ELEMENTWISE = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("add", "sub", "mul", "div", "true_divide")
} | {
    getattr(Tensor, name)
    for each in ("add", "sub", "mul", "truediv")
    for name in (f"__{each}__", f"__r{each}__")
}


class _Formulas(fused_calls):
    """Replaces operations that would fix the batch size in a trace.

    Attention uses its formula for all rows at once, not for blocks of rows. Sums, products and
    quotients get two tangents: PyTorch's rule for one expands it to the traced sizes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in _ELEMENTWISE and len(args) == 2:
            args = _both_dual(*args)
        if func is F.multi_head_attention_forward:
            with self:  # for the calls inside it
                return super().__torch_function__(func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _both_dual(*operands: Any) -> tuple[Any, ...]:
    """Both operands; if only one has a tangent, the other gets a tangent of zeros."""
    dual = [
        x
        for x in operands
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
    ]
    if len(dual) != 1:
        return operands
    like = dual[0]
    made = []
    for x in operands:
        if isinstance(x, (int, float)):
            x = torch.full((), x, dtype=torch.float64, device=like.device)  # promotes nothing
        if x is not like and isinstance(x, Tensor) and x.is_floating_point():
            x = x.contiguous()  # a traced view takes no tangent of another layout
            x = forward_ad.make_dual(x, torch.zeros_like(x))
        made.append(x)
    return tuple(made)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    operands = [query, key, value, attn_mask]
    pairs = [(None, None) if x is None else forward_ad.unpack_dual(x) for x in operands]
    (q, k, v, mask), (q_t, k_t, v_t, mask_t) = zip(*pairs, strict=True)
    if all(tangent is None for tangent in (q_t, k_t, v_t, mask_t)):
        return attention(q, k, v, mask, 0.0, is_causal, **options)
    found = attention_jvp(q, k, v, q_t, k_t, v_t, mask, mask_t, 0.0, is_causal, **options)
    return forward_ad.make_dual(*found)


def _exported(tangent: LinearizedModel, input_size: tuple[int, ...]) -> ExportedProgram:
    # On the CPU ops are computed by PyTorch's operators; on CUDA by our kernels.
    tangent = copy.deepcopy(tangent).cpu().requires_grad_(False)
    directions, logits = tangent.directions(), tangent.tangent_family.logits

    def merged(images: Tensor) -> Tensor:
        with _Formulas():
            output = logits(plain_dual_output(tangent.anchor, directions, (images,)))
            primal, slope = forward_ad.unpack_dual(output)
            return primal if slope is None else primal + slope

    def merged_in_level(images: Tensor) -> Tensor:
        for size in images.shape[1:]:
            int(size)  # fixes it: a Swin computes with sizes, and symbols of them take minutes
        return in_own_level(lambda: merged(images))

    dtype = next((p.dtype for p in tangent.anchor.parameters()), torch.float32)
    # Equal sizes would share a symbol.
    batch = next(size for size in itertools.count(2) if size not in input_size)
    example = torch.zeros((batch, *input_size), dtype=dtype)
    try:
        with torch.no_grad():
            # Traced first: within torch.export's own tracing forward mode fixes the batch size.
            graph = make_fx(merged_in_level, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                example
            )
            graph.graph.eliminate_dead_code()  # tangents that nobody reads
            graph.recompile()
            return torch.export.export(
                graph, (example,), dynamic_shapes=({0: Dim("batch", min=1)},)
            )
    except Exception as error:  # torch.export raises many kinds
        raise UnsupportedError(
            f"torch.export cannot trace {tangent.model_name} with inputs of shape "
            f"{('batch', *input_size)}: {error}"
        ) from error


def _check(program: ExportedProgram, tangent: LinearizedModel, input_size: tuple[int, ...]) -> None:
    """Compare the program with the model, for batch sizes other than the traced one."""
    like = next(tangent.anchor.parameters())
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        images = torch.randn((batch, *input_size), generator=generator).to(like.dtype)
        with torch.no_grad():
            expected = logits_of(tangent, images.to(like.device)).cpu().double()
            found = program.module()(images).double()
        close = 1e-2 if like.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if not torch.allclose(
            found, expected, rtol=close, atol=close * float(expected.abs().max())
        ):
            raise UnsupportedError(
                f"{tangent.model_name} was traced, but the program gives other outputs than the "
                f"model for a batch of {batch}: it cannot be exported"
            )
