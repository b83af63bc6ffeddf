"""Training by gradient descent: `fit`, `fit_head`, `fit_grouped`, groups of processes, FSDP."""
