"""Checkpoints on disk: open any dense source by its headers, write sharded safetensors."""

from moe_convert.checkpoint.names import stored_shapes
from moe_convert.checkpoint.safetensors import TensorRef, read_folder, read_header
from moe_convert.checkpoint.source import TOKENIZER_FILES, Source, open_source
from moe_convert.checkpoint.writer import CheckpointWriter, Shard, TensorSpec, sha256_of, shard

__all__ = [
    "TOKENIZER_FILES",
    "CheckpointWriter",
    "Shard",
    "Source",
    "TensorRef",
    "TensorSpec",
    "open_source",
    "read_folder",
    "read_header",
    "sha256_of",
    "shard",
    "stored_shapes",
]
