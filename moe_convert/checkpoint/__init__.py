"""Checkpoints on disk: open any dense source by its headers, write sharded safetensors."""

from moe_convert.checkpoint.hashing import sha256_of
from moe_convert.checkpoint.names import stored_shapes
from moe_convert.checkpoint.safetensors import TensorRef, read_folder, read_header
from moe_convert.checkpoint.source import TOKENIZER_FILES, Source, card_data, open_source
from moe_convert.checkpoint.writer import CheckpointWriter, Shard, TensorSpec, shard

__all__ = [
    "TOKENIZER_FILES",
    "CheckpointWriter",
    "Shard",
    "Source",
    "TensorRef",
    "TensorSpec",
    "card_data",
    "open_source",
    "read_folder",
    "read_header",
    "sha256_of",
    "shard",
    "stored_shapes",
]
