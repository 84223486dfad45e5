"""Render the card from the manifest and write it beside the weights.

The card and its picture follow from the manifest and are not among the files that it hashes, or
each would make the other stale. The manifest keeps the hash of the card as it was written, which
tells a card of ours from one that somebody has edited.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from moe_convert.card import facts, measured
from moe_convert.card.metadata import metadata
from moe_convert.card.picture import draw_load
from moe_convert.checkpoint import sha256_of
from moe_convert.checkpoint.replace import stage_of
from moe_convert.errors import MissingDependencyError, OutputExistsError
from moe_convert.manifest import Manifest

CARD_NAME = "README.md"
PICTURE_NAME = "routing.png"
TEMPLATE_NAME = "card.md.j2"
NAME = re.compile(r'\.from_pretrained\("([^"]+)"')

log = logging.getLogger(__name__)


def render(manifest: Manifest, name: str, *, picture: bool) -> str:
    """Return the text of README.md; `name` is the folder's or the Hub's org/name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("moe_convert"),
        autoescape=select_autoescape(default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    title = name.rpartition("/")[2]
    return environment.get_template(TEMPLATE_NAME).render(
        manifest=manifest,
        facts=facts,
        measured=measured,
        metadata=metadata(manifest, title).to_yaml().strip(),
        title=title,
        name=name,
        picture=PICTURE_NAME if picture else "",
    )


def write_card(
    folder: Path, manifest: Manifest, *, name: str | None = None, overwrite: bool = False
) -> Path:
    """Write README.md and the routing picture into a folder, and return the card's path.

    Without a `name` the card keeps the org/name that it has, or is called after the folder.

    Raises:
        OutputExistsError: there is a README.md that we did not write, or that was edited since.
    """
    path = folder / CARD_NAME
    if path.exists() and not overwrite and not _untouched(path, manifest):
        raise OutputExistsError(
            f"{path} was edited, or moe-convert did not write it.",
            "Keep it, or replace it with `moe-convert card --overwrite`.",
        )
    _make(folder, manifest, folder, name)
    manifest.save(folder)
    return path


def _make(folder: Path, manifest: Manifest, into: Path, name: str | None = None) -> bool:
    """Write a folder's card and picture into another one; return whether there is a picture.

    The manifest gets the hash of the card, and is to be written after it.
    """
    picture = _draw(into, manifest)
    known = name_in(folder / CARD_NAME)
    name = name or (known if "/" in known else folder.resolve().name)
    text = render(manifest, name, picture=picture)
    (into / CARD_NAME).write_text(text, encoding="utf-8")
    manifest.card_sha256 = sha256_of(into / CARD_NAME)
    return picture


def refresh_card(folder: Path, manifest: Manifest) -> None:
    """Bring a card of ours up to date after the manifest has changed; leave any other alone."""
    path = folder / CARD_NAME
    if path.exists() and _untouched(path, manifest):
        write_card(folder, manifest)


def stage_card(folder: Path, manifest: Manifest) -> list[str]:
    """Put the new card with a change that is put in place at once; return the files that then go.

    As in `refresh_card`, a card that is not ours stays. The manifest is the new one, and is to be
    staged after the card.
    """
    path = folder / CARD_NAME
    if not (path.exists() and _untouched(path, manifest)):
        return []
    return [] if _make(folder, manifest, stage_of(folder)) else [PICTURE_NAME]


def name_in(path: Path) -> str:
    """Return the name under which a card says that its model is loaded; empty if it says none."""
    found = NAME.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found[1] if found else ""


def _untouched(path: Path, manifest: Manifest) -> bool:
    return manifest.card_sha256 is not None and sha256_of(path) == manifest.card_sha256


def _draw(folder: Path, manifest: Manifest) -> bool:
    """Draw the routing picture; whether there is one."""
    layers, load = measured.load(manifest)
    if not load:
        return False
    try:
        draw_load(layers, load, folder / PICTURE_NAME)
    except (MissingDependencyError, OSError, ValueError, RuntimeError) as error:
        log.info("the card has no picture of the routing: %s", error)
        (folder / PICTURE_NAME).unlink(missing_ok=True)
        return False
    return True
