"""Clustering of hidden states and neurons: deterministic, no file and no model."""

from moe_convert.clustering.lloyd import balanced_kmeans, kmeans
from moe_convert.clustering.transport import balanced

__all__ = ["balanced", "balanced_kmeans", "kmeans"]
