"""What every training run of this package shares: rates, the optimiser, batches, checkpoints."""
