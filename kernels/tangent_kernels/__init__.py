"""Triton kernels that compute a primal and its tangent in one pass.

Plain tensors in, plain tensors out: no autograd, no ``nn.Module``, nothing of ``tangent_ops``.
"""
