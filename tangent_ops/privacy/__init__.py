"""Differential privacy for tangent transformers: training, accounting, audit."""
