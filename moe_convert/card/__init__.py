"""The model card: README.md, rendered from the manifest alone and checked against it."""

from moe_convert.card.check import CardCheck, check_card
from moe_convert.card.metadata import metadata
from moe_convert.card.write import (
    CARD_NAME,
    PICTURE_NAME,
    refresh_card,
    render,
    stage_card,
    write_card,
)

__all__ = [
    "CARD_NAME",
    "PICTURE_NAME",
    "CardCheck",
    "check_card",
    "metadata",
    "refresh_card",
    "render",
    "stage_card",
    "write_card",
]
