"""What is trained: the layout of a peer's row, the low-rank kernel, adapters on a model, ranks, cores, residuals."""
