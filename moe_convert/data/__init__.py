"""Text to token ids: the one reader of data sets."""

from moe_convert.data.checks import check_data, check_varied
from moe_convert.data.packing import pack, tokenizer_of
from moe_convert.data.prompts import Prompt, prompt_ids
from moe_convert.data.reading import find_files, read_documents
from moe_convert.data.rows import Document
from moe_convert.data.settings import Data, HubDataset
from moe_convert.data.tables import require_datasets
from moe_convert.data.tokens import Writer, token_ids, unwritten
from moe_convert.data.writing import SelfWriter

__all__ = [
    "Data",
    "Document",
    "HubDataset",
    "Prompt",
    "SelfWriter",
    "Writer",
    "check_data",
    "check_varied",
    "find_files",
    "pack",
    "prompt_ids",
    "read_documents",
    "require_datasets",
    "token_ids",
    "tokenizer_of",
    "unwritten",
]
