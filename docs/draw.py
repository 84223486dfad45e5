"""Draw docs/overview.svg: what becomes of one dense FFN in each of the three ways.

Run `python docs/draw.py`; a test tells when the file is not what this draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PICTURE = Path(__file__).parent / "overview.svg"
WIDTH, HEIGHT = 880, 400
INK, FAINT, PAPER = "#24292f", "#8c959f", "#ffffff"
BASE, CODE, MATHS, CHAT = "#4c78a8", "#e4883a", "#59a14f", "#b279a2"
ROWS = (92, 212, 332)
ROUTER_X, EXPERTS_X, WORDS_X = 300, 380, 620
CELL, GAP, TALL = 44, 10, 56

CLONE = ["copies of the whole FFN", "exactly the dense model at step 0"]
SPLIT = ["pieces of the one FFN", "same size, a part per token"]
COMPOSE = ["FFNs of several models", "domain experts, one router"]


def text(x: float, y: float, words: str, *, size: int = 14, fill: str = INK, bold: bool = False,
         middle: bool = False) -> str:  # fmt: skip
    """Return one line of text."""
    weight = ' font-weight="600"' if bold else ""
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{weight}{anchor}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *, used: bool = True) -> str:
    """Return a rounded box, pale where a token does not use it."""
    opacity = 1.0 if used else 0.28
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" '
        f'fill-opacity="{opacity}"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return a line with a head."""
    return (
        f'<path d="M{x} {y} C{(x + to_x) / 2} {y} {(x + to_x) / 2} {to_y} {to_x} {to_y}" '
        f'fill="none" stroke="{FAINT}" stroke-width="2" marker-end="url(#head)"/>'
    )


def dense() -> list[str]:
    """Return the model that goes in: one block, with its FFN in the colour of the experts."""
    top, x = 112, 40
    return [
        text(x + 70, top - 22, "dense model", size=15, bold=True, middle=True),
        box(x, top, 140, 42, "#d0d7de"),
        text(x + 70, top + 26, "attention", middle=True),
        box(x, top + 52, 140, 96, BASE),
        text(x + 70, top + 96, "FFN", size=16, fill=PAPER, bold=True, middle=True),
        text(x + 70, top + 116, "every token uses", size=12, fill=PAPER, middle=True),
        text(x + 70, top + 132, "all of it", size=12, fill=PAPER, middle=True),
        text(x + 70, top + 172, "in every layer", size=12, fill=FAINT, middle=True),
    ]


def router(y: float) -> str:
    """Return a router box centred on a row."""
    return box(ROUTER_X, y - 16, 58, 32, "#eaeef2") + text(
        ROUTER_X + 29, y + 4, "router", size=12, middle=True
    )


def row(
    y: float, name: str, experts: Sequence[tuple[float, str, bool]], words: list[str]
) -> list[str]:
    """Return one way: its name, its experts (width, colour, used) and what to expect of it."""
    parts = [arrow(186, 212, ROUTER_X - 8, y), router(y)]
    x: float = EXPERTS_X
    for width, fill, used in experts:
        parts.append(box(x, y - TALL / 2, width, TALL, fill, used=used))
        x += width + GAP * (0.5 if width < CELL else 1)
    parts.append(text(WORDS_X, y - 20, name, size=15, bold=True))
    parts += [text(WORDS_X, y + 2 + 19 * n, line, size=13) for n, line in enumerate(words)]
    return parts


def names() -> list[str]:
    """Return what the composed experts are called, below them."""
    y, step = ROWS[2] + 44, CELL + GAP
    return [
        text(EXPERTS_X + CELL / 2 + n * step, y, name, size=11, fill=FAINT, middle=True)
        for n, name in enumerate(("base", "code", "maths", "chat"))
    ]


def picture() -> str:
    """Return the whole SVG."""
    narrow = (4 * CELL + 3 * GAP - 7 * GAP / 2) / 8
    used = {0, 1, 4}
    clone = [(CELL, BASE, n in {0, 2}) for n in range(4)]
    split = [(narrow, BASE, n in used) for n in range(8)]
    compose = [(CELL, colour, n < 2) for n, colour in enumerate((BASE, CODE, MATHS, CHAT))]
    parts = [
        *dense(),
        *row(ROWS[0], "clone", clone, CLONE),
        *row(ROWS[1], "split", split, SPLIT),
        *row(ROWS[2], "compose", compose, COMPOSE),
        *names(),
    ]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0 8 4 0 8z" fill="{FAINT}"/></marker></defs>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">\n'
        "<title>One dense FFN becomes experts by clone, split or compose</title>\n"
        f'{head}\n<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>\n'
        + text(ROUTER_X, 34, "Mixture-of-Experts layer", size=15, bold=True)
        + text(WORDS_X, 34, "(a token uses the dark boxes)", size=12, fill=FAINT)
        + f"\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
