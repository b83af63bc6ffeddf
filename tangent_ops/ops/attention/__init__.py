"""Attention with tangents: PyTorch's signature, the paths behind it, and their derivatives."""
