"""What runs on dual tensors: the fused ops and the context that routes calls to them."""
