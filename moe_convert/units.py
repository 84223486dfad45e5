"""Sizes and counts for people, in powers of ten."""

from __future__ import annotations


def num_bytes(count: float) -> str:
    """Return a size in bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def num_params(count: int) -> str:
    """Return a parameter count with its unit."""
    if count >= 10**9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 10**6 else f"{count / 1e3:.1f} k"
