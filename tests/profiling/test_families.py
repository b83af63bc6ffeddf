"""Families of operations and kernels, against names written down by hand."""

from __future__ import annotations

import pytest

from tangent_ops.profiling.families import FAMILIES, MEANING, family

ENGINE = "autograd::engine::evaluate_function: "
MATH = ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math")

# The names of the operations around it, outermost first, its own last; and the family.
OPERATIONS = [
    # by what it is part of
    ((*MATH, "aten::matmul", "aten::bmm"), "attention"),
    ((*MATH, "aten::mul"), "attention"),
    (("AttentionInParts", "aten::bmm"), "attention"),
    (("AttentionInParts", "aten::copy_"), "attention"),
    (
        (ENGINE + "AttentionInPartsBackward", "AttentionInPartsBackward", "aten::baddbmm"),
        "attention",
    ),
    ((*MATH, "aten::bmm", ENGINE + "BmmBackward0", "BmmBackward0", "aten::bmm"), "attention"),
    (("_Jvp", "tangent_ops::attention_jvp"), "attention"),
    (("_VjpBackward", "aten::empty"), "attention"),
    (("_JvpOfPlainBackward", "aten::empty_strided"), "attention"),
    (("aten::softmax", "aten::_softmax"), "attention"),
    (("_LayerNorm", "aten::addcmul_"), "norm"),
    (("aten::layer_norm", "aten::native_layer_norm", "aten::mul"), "norm"),
    ((ENGINE + "NativeLayerNormBackward0", "NativeLayerNormBackward0", "aten::empty"), "norm"),
    (("aten::rms_norm", "aten::pow"), "norm"),
    (("aten::batch_norm", "aten::native_batch_norm"), "norm"),
    (("_Gelu", "aten::mul"), "activation"),
    (("aten::gelu", "aten::gelu_backward", "aten::mul"), "activation"),
    (("aten::silu_",), "activation"),
    ((ENGINE + "GeluBackward0",), "activation"),
    # by its own name
    (("aten::linear", "aten::addmm"), "GEMM"),
    (("_Linear", "aten::addmm"), "GEMM"),
    (("_LinearBackward", "aten::matmul", "aten::mm"), "GEMM"),
    (("aten::conv2d", "aten::mkldnn_convolution"), "GEMM"),
    (("aten::bmm",), "GEMM"),
    ((ENGINE + "AddmmBackward0", "AddmmBackward0"), "GEMM"),
    (("aten::linear", "aten::reshape", "aten::clone", "aten::copy_"), "copy"),
    (("aten::cat",), "copy"),
    (("aten::zeros", "aten::zero_"), "copy"),
    (("aten::add",), "elementwise"),
    (("aten::add_",), "elementwise"),
    (("_LinearBackward", "aten::sum"), "elementwise"),
    ((ENGINE + "AddBackward0", "AddBackward0"), "elementwise"),
    # by the innermost name that says something
    (("aten::linear", "aten::t", "aten::transpose"), "GEMM"),
    (("aten::add", "aten::empty"), "elementwise"),
    # by none
    (("aten::cross_entropy_loss", "aten::log_softmax", "aten::_log_softmax"), "other"),
    (("aten::nll_loss_nd", "aten::nll_loss_forward"), "other"),
    (("aten::view",), "other"),
    (("aten::_make_dual", "aten::alias"), "other"),
    (("torch::autograd::AccumulateGrad",), "other"),
    (("aten::upsample_bilinear2d",), "other"),
    ((), "other"),
]

# Kernels whose launch is not known: by their name alone.
KERNELS = [
    ("attention_jvp_kernel", "attention"),
    ("grad_query_kernel", "attention"),
    ("grad_key_value_kernel", "attention"),
    ("grad_mask_kernel", "attention"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64>>", "attention"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    (
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false>",
        "attention",
    ),
    ("void at::native::cunn_SoftMaxForward<4, float, SoftMaxForwardEpilogue>", "attention"),
    ("void at::native::cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>", "other"),
    ("void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float>", "other"),
    ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norm"),
    ("void at::native::GammaBetaBackwardCUDAKernelTemplate<float>", "norm"),
    ("triton_per_fused_native_layer_norm_0", "norm"),
    ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "norm"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "GEMM"),
    ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize32x32x64_relu", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "GEMM"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "GEMM"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816wgrad_optimized>", "GEMM"),
    ("triton_tem_fused_mm_3", "GEMM"),
    (
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        "activation",
    ),
    ("triton_poi_fused_gelu_2", "activation"),
    ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copy"),
    ("void at::native::CatArrayBatchedCopy<float>", "copy"),
    ("Memcpy DtoD (Device -> Device)", "copy"),
    ("Memset (Device)", "copy"),
    ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "elementwise"),
    ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>", "elementwise"),
    ("void at::native::multi_tensor_apply_kernel<>", "elementwise"),
    ("triton_poi_fused_add_1", "elementwise"),
    ("triton_red_fused_sum_4", "elementwise"),
    ("something_new", "other"),
]


@pytest.mark.parametrize(("names", "expected"), OPERATIONS)
def test_operations(names: tuple[str, ...], expected: str) -> None:
    assert family(names) == expected


@pytest.mark.parametrize(("kernel", "expected"), KERNELS)
def test_kernels_by_name(kernel: str, expected: str) -> None:
    assert family((), kernel) == expected


def test_a_kernel_is_part_of_what_launched_it() -> None:
    gemm = "ampere_sgemm_128x64_tn"
    assert family((*MATH, "aten::bmm"), gemm) == "attention"
    assert family(("aten::linear", "aten::addmm"), gemm) == "GEMM"
    assert family(("_LayerNorm", "aten::mul"), "vectorized_elementwise_kernel") == "norm"


def test_a_kernels_own_name_comes_before_its_operations() -> None:
    """The bias of a linear layer is added, and its operand copied, by kernels of their own."""
    assert family(("aten::linear", "aten::addmm"), "elementwise_kernel<direct_copy>") == "copy"
    assert family(("aten::linear", "aten::addmm"), "something_new") == "GEMM"


def test_every_family_has_a_meaning() -> None:
    assert tuple(MEANING) == FAMILIES
    assert {expected for _, expected in (*OPERATIONS, *KERNELS)} == set(FAMILIES)
