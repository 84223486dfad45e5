"""Turn dense Hugging Face checkpoints into Mixture-of-Experts models of stock architectures."""

__version__ = "0.1.0"
