"""Per-sample gradients of a linearized model."""
