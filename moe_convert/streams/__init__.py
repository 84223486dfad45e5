"""Run models layer by layer, one layer's weights in memory at a time.

The call arguments of every layer (rotary embeddings, masks) are recorded once by running the model
with its layers replaced by stubs; after that each layer is loaded, run and dropped in turn. The
dense stream runs the source's own layer class; the converted stream runs the target's, with the
tensors that were just made.
"""

from moe_convert.streams.base import Stream, skeleton
from moe_convert.streams.branched import HEAD_TOKENS, BranchedStream
from moe_convert.streams.converted import ConvertedStream
from moe_convert.streams.dense import DenseStream
from moe_convert.streams.room import Room
from moe_convert.streams.sample import SAMPLE_TEXT, sample_ids

__all__ = [
    "HEAD_TOKENS",
    "SAMPLE_TEXT",
    "BranchedStream",
    "ConvertedStream",
    "DenseStream",
    "Room",
    "Stream",
    "sample_ids",
    "skeleton",
]
