"""Tests: real tiny checkpoints made by transformers itself, nothing replaced by a stand-in."""
