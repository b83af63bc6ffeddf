"""For maintainers: compile check, tuner and sanitizer of the kernels; pages that are written."""
