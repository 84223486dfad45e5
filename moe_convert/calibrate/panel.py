"""How a calibration looks while it runs: a live panel, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_convert.calibrate.report import Silent, StepRecord, Watcher
from moe_convert.manifest import CalibrationReport, Measured

LINE_INTERVAL_S = 5.0
MAX_LAYERS, MAX_CELLS = 16, 64
COLD, FAIR, HOT = 0.1, 1.0, 3.0
"""Loads over the fair share at which a cell is drawn black, green and red."""


@contextmanager
def watcher(console: Console, *, show: bool) -> Iterator[Watcher]:
    """Yield what draws on this console; nothing where it is not to `show`."""
    if not show:
        yield Silent()
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            yield LivePanel(live)
    else:
        yield Lines(console)


class Lines:
    """A line when a phase begins, then one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0

    def phase(self, what: str) -> None:
        """Name it."""
        self._console.print(f"calibrate: {what}")

    def measured(self, when: str, found: Measured) -> None:
        """Say the perplexities."""
        values = f"{found.perplexity:.4g}, dense {found.dense_perplexity:.4g}"
        self._console.print(f"calibrate: perplexity {when} {values}")

    def step(self, record: StepRecord) -> None:
        """Say where it stands, now and then and at the end."""
        now = time.monotonic()
        if now - self._last > LINE_INTERVAL_S or record.step in {1, record.steps}:
            self._last = now
            self._console.print(f"calibrate: {step_line(record)}")


class LivePanel:
    """Loss terms, speed, time left and the load of every layer, redrawn in place."""

    def __init__(self, live: Live) -> None:
        self._live, self._started, self._first = live, time.monotonic(), 0
        self._measured: dict[str, Measured] = {}

    def phase(self, what: str) -> None:
        """Name it where the figures will be."""
        self._live.update(Panel(Text(what), title="calibrate", width=100))

    def measured(self, when: str, found: Measured) -> None:
        """Keep it for the panel."""
        self._measured[when] = found

    def step(self, record: StepRecord) -> None:
        """Draw it."""
        if not self._first:
            self._first, self._started = record.step, time.monotonic()
        self._live.update(self._panel(record))

    def _panel(self, record: StepRecord) -> Panel:
        done = record.step - self._first
        spent = time.monotonic() - self._started
        left = f"{clock(spent / done * (record.steps - record.step))} left" if done else ""
        grid = Table.grid(padding=(0, 2))
        grid.add_row("step", f"{record.step} of {record.steps}", f"{record.tokens:,} tokens", left)
        grid.add_row("loss", f"{record.loss:.4f}", terms_text(record), f"lr {record.lr:.2g}")
        speed = f"{record.tokens_per_s:,.0f} tokens/s"
        grid.add_row("speed", speed, f"gradient {record.grad_norm:.3g}", "")
        dead = f"{record.dead_experts} dead experts"
        grid.add_row("load", f"MaxVio {record.max_violation:.2f}", dead, "")
        before = self._measured.get("before")
        if before:
            start = f"perplexity at the start {before.perplexity:.4g}"
            grid.add_row("", start, f"dense {before.dense_perplexity:.4g}", "")
        bar = ProgressBar(total=record.steps, completed=record.step, width=96)
        return Panel(Group(grid, bar, heat(record.load)), title="calibrate", width=100)


def step_line(record: StepRecord) -> str:
    """Return a step in one line."""
    return (
        f"step {record.step}/{record.steps}, loss {record.loss:.4f} ({terms_text(record)}), "
        f"{record.tokens_per_s:,.0f} tokens/s, MaxVio {record.max_violation:.2f}, "
        f"{record.dead_experts} dead experts"
    )


def terms_text(record: StepRecord) -> str:
    """Return the loss terms, unweighted."""
    return ", ".join(f"{name} {value:.4f}" for name, value in record.terms.items())


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def heat(load: tuple[tuple[float, ...], ...]) -> Text:
    """Return a strip for each layer, evenly picked if there are many: a cell for each expert."""
    stride = -(-len(load) // MAX_LAYERS)
    text = Text()
    for layer in range(0, len(load), stride):
        shares = load[layer]
        text.append(f"\n{layer:3d} ", style="dim")
        for share in shares[:MAX_CELLS]:
            text.append("█", style=_color(share * len(shares)))
        if len(shares) > MAX_CELLS:
            text.append(f" +{len(shares) - MAX_CELLS}", style="dim")
    return text


def _color(load: float) -> str:
    """Return grey for a dead expert, then blue through green to red as the load rises."""
    if load < COLD:
        return "grey23"
    if load < FAIR:
        part = (load - COLD) / (FAIR - COLD)
        return f"rgb(40,{int(90 + 110 * part)},{int(200 - 140 * part)})"
    part = min(1.0, (load - FAIR) / (HOT - FAIR))
    return f"rgb({int(40 + 200 * part)},{int(200 - 150 * part)},50)"


def table(report: CalibrationReport) -> Table:
    """Return what calibration changed, before and after."""
    before, after = report.before, report.after
    rows: dict[str, tuple[Any, Any]] = {
        f"perplexity (dense {before.dense_perplexity:.4g})": (
            f"{before.perplexity:.4g}",
            f"{after.perplexity:.4g}",
        ),
        "KL to dense": (f"{before.kl:.4g}", f"{after.kl:.4g}"),
        "top-1 agreement": (f"{before.top1_agreement:.1%}", f"{after.top1_agreement:.1%}"),
        "MaxVio, worst layer": (f"{before.max_violation:.2f}", f"{after.max_violation:.2f}"),
        f"dead experts of {before.num_experts}": (before.dead_experts, after.dead_experts),
        "routing value": (f"{before.routing_value:+.4g}", f"{after.routing_value:+.4g}"),
    }
    result = Table("", "before", "after", box=None, padding=(0, 2, 0, 0))
    for name, values in rows.items():
        result.add_row(name, *map(str, values))
    return result


def lines(report: CalibrationReport) -> Iterator[str]:
    """Yield what was done, line by line."""
    resumed = f", resumed at step {report.resumed_from}" if report.resumed_from else ""
    early = ", stopped early" if report.stopped_early else ""
    yield (
        f"trained   {' + '.join(report.trained)} ({report.trained_params:,} parameters), "
        f"{report.steps} steps, {report.tokens:,} tokens of {report.data}{resumed}{early}"
    )
    if report.objective:
        yield f"loss      {report.loss_first:.4g} to {report.loss_last:.4g}"
    for failure in report.failures:
        yield f"FAILED    {failure}"
