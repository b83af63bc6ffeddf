"""Per-sample gradients of a tangent model."""
