"""Fused operations on dual tensors, and the context that routes calls to them."""
