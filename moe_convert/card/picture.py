"""The heat map of a card: each expert's share of the tokens, layer by layer."""

from __future__ import annotations

from pathlib import Path

from moe_convert.errors import MissingDependencyError

INCHES_PER_CELL = 0.22
LARGEST_INCHES = 9.0
TICKS = 16


def draw_load(layers: list[int], load: list[list[float]], path: Path) -> None:
    """Write a PNG with a row per layer, a column per expert and an even load as the middle.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Drawing the routing heat map needs matplotlib.", "pip install 'moe-convert[report]'"
        ) from error
    times_even = [[share * len(row) for share in row] for row in load]
    width, height = (
        min(LARGEST_INCHES, 1.5 + INCHES_PER_CELL * max(count, 12))
        for count in (len(times_even[0]), len(times_even))
    )
    figure = Figure(figsize=(width + 1.0, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        times_even, cmap="coolwarm", vmin=0.0, vmax=2.0, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    rows = range(0, len(layers), 1 + len(layers) // TICKS)
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    axes.set_xticks(range(0, len(times_even[0]), 1 + len(times_even[0]) // TICKS))
    figure.colorbar(image, ax=axes, extend="max", label="load, 1 = even share")
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})
