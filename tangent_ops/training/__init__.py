"""Training of deltas: one model, many at once, several processes."""
