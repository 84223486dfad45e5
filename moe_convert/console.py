"""How results, progress and errors look: tables for people, one JSON object for programs.

Results go to stdout and everything else to stderr.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe_convert import __version__
from moe_convert.errors import MoeConvertError
from moe_convert.units import num_bytes, num_params

if TYPE_CHECKING:
    from moe_convert.devices import DeviceRow
    from moe_convert.experts import ExpertsNode
    from moe_convert.hub import Pushed
    from moe_convert.manifest import Manifest, Routing, Sensitivity, SplitReport, VerifyReport
    from moe_convert.plan import Plan
    from moe_convert.targets import MoeShape

RESULT_SCHEMA = "moe-convert/result/1"
PHASES = {
    "source": "fetch source",
    "write": "write text",
    "layers": "try layers",
    "learn": "learn split",
}
"""What the phases are called that have another name in the code."""
PLAIN_INTERVAL_S = 5.0
SLOWEST_S = 3600.0
"""How long one layer may take for there still to be an estimate of the time left."""

Format = Literal["auto", "human", "json", "quiet"]
Report = Callable[[str, int, int], None]


@dataclass
class Output:
    """Where one command's output goes."""

    command: str
    format: Format = "auto"
    show_progress: bool = True
    verbose: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Open the consoles; `auto` means human."""
        if self.format == "auto":
            self.format = "human"
        self.out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())

    @property
    def human(self) -> bool:
        """Whether a person reads."""
        return self.format == "human"

    def say(self, what: object) -> None:
        """Print a message for people, to stderr."""
        if self.human:
            self.err.print(what)

    def result(
        self,
        sections: Mapping[str, Any],
        *,
        quiet: str,
        human: Callable[[Console], None],
        status: str = "ok",
        error: MoeConvertError | None = None,
    ) -> None:
        """Print a command's result in the wanted format."""
        if self.format == "json":
            print(json.dumps(self.envelope(sections, status, error)), file=sys.stdout)  # noqa: T201
        elif self.format == "quiet":
            print(quiet, file=sys.stdout)  # noqa: T201
        else:
            human(self.out)

    def envelope(
        self, sections: Mapping[str, Any], status: str, error: MoeConvertError | None
    ) -> dict[str, Any]:
        """Return the JSON object that every command prints."""
        started = datetime.datetime.fromtimestamp(self.started, datetime.timezone.utc)
        found = error and {"code": error.code, "message": error.message, "hint": error.hint}
        return {
            "schema": RESULT_SCHEMA,
            "command": self.command,
            "status": status,
            "exit_code": error.exit_code if error else 0,
            "version": {"moe-convert": __version__},
            "started_at": started.isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 3),
            "warnings": [],
            **sections,
            "error": found,
        }

    def fail(
        self,
        sections: Mapping[str, Any],
        error: MoeConvertError,
        human: Callable[[Console], None],
        status: str = "gate_failed",
    ) -> None:
        """Print a result whose check failed, and why."""
        self.result(sections, quiet="fail", human=human, status=status, error=error)
        self._complain(error)

    def error(self, error: MoeConvertError, status: str = "failed") -> None:
        """Print an error: one line on stderr, and the envelope where a program reads."""
        if self.format == "json":
            envelope = self.envelope({}, status, error)
            print(json.dumps(envelope), file=sys.stdout)  # noqa: T201
        self._complain(error)

    def _complain(self, error: MoeConvertError) -> None:
        self.err.print(f"[bold red]error:[/] {_plain(error.message)} {_plain(error.hint)}".rstrip())

    def warn(self, notes: Any) -> None:
        """Print warnings for people; programs find them in the envelope."""
        if self.format == "json":
            return
        for note in notes:
            self.err.print(
                f"[yellow]warning:[/] {_plain(note.message)} {_plain(note.hint)}".rstrip()
            )

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Show a bar with rate and time left, or plain lines where there is no terminal."""
        if not self.show_progress or not self.human:
            yield lambda what, done, total: None
        elif self.err.is_terminal:
            with _bar(self.err) as bar:
                yield _BarReport(bar)
        else:
            yield _LineReport(self.err)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that something of unknown length runs."""
        if self.show_progress and self.human and self.err.is_terminal:
            with self.err.status(what):
                yield
        else:
            yield


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<13}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=SLOWEST_S,
    )


class _BarReport:
    """Draws one bar per phase."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._tasks, self._since = bar, dict[str, Any](), dict[str, float]()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "upload":
            # The Hub library draws this one itself.
            self._bar.stop()
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(PHASES.get(what, what), total=total, rate="")
            self._since[what] = time.monotonic()
        if what == "source" and done == 0:
            self._bar.update(self._tasks[what], total=None)
            return
        seconds = max(time.monotonic() - self._since[what], 1e-3)
        rates = {"convert": f"{num_bytes(done / seconds)}/s", "split": f"layer {done} of {total}"}
        rate = rates.get(what, "")
        self._bar.update(self._tasks[what], completed=done, total=total, rate=rate)


class _LineReport:
    """Prints a line when a phase begins, now and then while it runs, and when it ends."""

    def __init__(self, console: Console) -> None:
        self._console, self._last, self._began = console, ("", 0.0), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        name, since = self._last
        now = time.monotonic()
        if name != what or now - since > PLAIN_INTERVAL_S or (done == total and total > 1):
            self._began = self._began if name == what else now
            percent = f"{PHASES.get(what, what)}: {100 * done // max(total, 1)}%"
            left = (now - self._began) * (total - done) / done if done else 0.0
            self._console.print(f"{percent}, {left:.0f} s left" if left >= 1 else percent)
            self._last = (what, now)


def plan_table(plan: Plan) -> Table:
    """Return what the conversion will make and take."""
    shape, estimate, body = plan.shape, plan.estimate, plan.layout.body
    dense = f" ({len(shape.dense_layers)} stay dense)" if shape.dense_layers else ""
    shared = f" + {shape.num_shared} shared" if shape.num_shared else ""
    in_groups = shape.num_groups > 1
    groups = (
        f", in {shape.num_groups} groups of which {shape.top_groups} are used" if in_groups else ""
    )
    verifies = plan.recipe.verify.enabled
    verify_ram = f", {num_bytes(estimate.verify_ram_bytes)} to verify" if verifies else ""
    rows = {
        "source": f"{plan.source.name}  {plan.layout.family.model_type}, "
        f"{num_params(plan.params_dense)} parameters, {plan.source.dtype}",
        "target": f"{plan.target.model_type} ({plan.target.architecture})",
        "method": f"{method_name(plan.recipe.experts)} ({plan.recipe.experts.paper}), "
        f"router {plan.recipe.router.kind}",
        "experts": f"{shape.without_nulls.num_experts} routed{shared}, {_chosen(shape)}, width "
        f"{shape.expert_size} in {len(shape.moe_layers)} of {body.num_layers} layers{dense}"
        f"{groups}",
        **_layers_row(plan),
        "parameters": f"{num_params(plan.params_total)} total, "
        f"{num_params(plan.params_active)} active per token",
        "tensors": f"{len(plan.specs)} in {len(plan.shards)} files, stored as {plan.dtype}",
        "step 0": "exactly the dense function" if plan.exact else "differs from the dense function",
        "download": num_bytes(estimate.download_bytes)
        + (", read layer by layer, nothing kept" if plan.source.streamed else ""),
        "disk": f"{num_bytes(estimate.disk_bytes)} of {num_bytes(estimate.free_disk_bytes)} free",
        "memory": f"{num_bytes(estimate.ram_bytes)}{verify_ram}"
        f" of {num_bytes(estimate.free_ram_bytes)} free",
        "time": f"{estimate.time_s[0]:.0f} to {estimate.time_s[1]:.0f} s (disks of 2 to 0.2 GB/s)",
        "output": str(plan.output),
        **_push_row(plan),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, _plain(value))
    for engine, notes in plan.engines.items():
        table.add_row(engine, _plain("; ".join(notes)) if notes else "loads it, no known trap")
    for row in plan.devices:
        table.add_row(f"{row.num_devices} devices", device_line(row))
    for target, reasons in plan.refused.items():
        table.add_row(f"not {target}", _plain("; ".join(reasons)))
    return table


def _chosen(shape: MoeShape) -> str:
    """Return how many routed experts a token uses."""
    if not shape.null_experts:
        return f"top-{shape.top_k}"
    least = shape.top_k - shape.null_experts
    return (
        f"{least} to {shape.top_k} and {shape.used_k} on average above a threshold made of "
        f"{shape.null_experts} experts of zeros"
    )


def method_name(method: ExpertsNode) -> str:
    """Return the method, and for a split its strategy."""
    return f"{method.method} {getattr(method, 'strategy', '')}".rstrip()


def _layers_row(plan: Plan) -> dict[str, str]:
    """Return what is open until it is measured, if anything is."""
    if plan.densest is None:
        return {}
    most, active = len(plan.densest.shape.dense_layers), num_params(plan.densest.params_active)
    return {
        "layers": f"auto: decided by measurement before conversion; up to {most} stay dense, and "
        f"then up to {active} parameters are active (all else here: none stays dense)"
    }


def _push_row(plan: Plan) -> dict[str, str]:
    """Return where the result will be published, if anywhere."""
    target = plan.recipe.push
    if target.repo_id is None:
        return {}
    kinds = {True: "private", False: "public", None: "private if it is new"}
    place = "a pull request" if target.create_pr else target.branch or "main"
    return {"push": f"{target.repo_id} ({kinds[target.private]}), {place}"}


def device_line(row: DeviceRow) -> str:
    """Return what one number of devices means under expert parallelism."""
    return (
        f"{num_bytes(row.weight_bytes)} each, all-to-all "
        f"{num_bytes(row.expected_all_to_all_bytes)} per token "
        f"(max {num_bytes(row.max_all_to_all_bytes)}), {row.flop_per_byte:.0f} expert FLOP per byte"
    )


def tensor_table(plan: Plan) -> Table:
    """Return every tensor of the result."""
    table = Table("tensor", "dtype", "shape", "file", box=None)
    for shard in plan.shards:
        for spec in shard.specs:
            table.add_row(spec.name, spec.dtype, _plain(str(list(spec.shape))), shard.file)
    return table


def push_lines(pushed: Pushed, every_file: bool) -> Iterator[str]:
    """Yield what a push did or would do, line by line."""
    for file in pushed.section["files"] if every_file else ():
        yield f"{file['action']:<8}{num_bytes(file['size']):>10}  {file['path']}"
    if not pushed.compared:
        yield "The Hub was not asked: what it holds already is listed too."
    kind = ("new, " if pushed.new else "") + ("private" if pushed.private else "public")
    verb = "would upload" if pushed.dry_run else "uploaded"
    pruned = f", {len(pushed.deleted)} deleted" if pushed.deleted else ""
    where = f"{pushed.repo_id} ({kind}), {pushed.revision}"
    if pushed.uploaded or pushed.deleted:
        amount = f"{len(pushed.uploaded)} files, {num_bytes(pushed.uploaded_bytes)}{pruned}"
        yield f"{verb} {amount} to {where}"
    else:
        yield f"nothing to upload: {where} holds all {len(pushed.files)} files"
    yield pushed.pr_url or pushed.url


def verify_lines(report: VerifyReport) -> Iterator[str]:
    """Yield what a verification found, line by line."""
    yield f"keys      {len(report.missing_keys)} missing, {len(report.unexpected_keys)} unexpected"
    for parity in report.parity:
        yield (
            f"parity    {parity.dtype}: max |logit difference| {parity.max_abs_diff:.2e}, "
            f"KL {parity.kl:.2e}, top-1 agreement {parity.top1_agreement:.2%}, "
            f"perplexity x {parity.ppl_ratio or 1:.4g}"
        )
    if not report.parity:
        yield "parity    not checked: no dense source at hand, give one with --source"
    if report.router_logit_std:
        low, high = min(report.router_logit_std), max(report.router_logit_std)
        yield f"router    logit std {low:.3g} to {high:.3g} by layer, on text and random tokens"
    if report.experts_exercised is not None:
        yield f"experts   {report.experts_exercised:.0%} were used by the check's tokens"
    if report.tokenizer_identical is not None:
        yield f"tokenizer {'identical' if report.tokenizer_identical else 'differs'}"
    for text in report.generation:
        yield f"generates {text!r}"
    for failure in report.failures:
        yield f"FAILED    {failure}"


def routing_lines(routing: Routing) -> Iterator[str]:
    """Yield what the first routers would do with the data, line by line."""
    low, high = min(routing.logit_std), max(routing.logit_std)
    known = [value for value in routing.condition if value is not None]
    condition = f"{min(known):.3g} to {max(known):.3g}" if known else "infinite"
    yield (
        f"routers   on {routing.tokens} tokens ({routing.data}): logit std {low:.3g} to "
        f"{high:.3g}, condition number {condition}"
    )
    experts = sum(len(load) for load in routing.load)
    if routing.mean_k:
        low, high = min(routing.mean_k), max(routing.mean_k)
        yield f"threshold a token uses {low:.2f} to {high:.2f} routed experts on average, by layer"
    before = f" (unbalanced {routing.unbalanced:.2f})" if routing.unbalanced else ""
    yield (
        f"load      {routing.entropy_mean:.1%} even, busiest expert {routing.max_over_mean:.2f} "
        f"times its share{before}, {routing.dead_experts} of {experts} nearly unused"
    )


BLOCKS = "▁▂▃▄▅▆▇█"


def split_lines(report: SplitReport) -> Iterator[str]:
    """Yield how far the converted stream is from the dense one, drawn by layer."""
    top = max(report.stream_error, default=0.0)
    scale = (len(BLOCKS) - 1) / top if top else 0.0
    drawn = "".join(BLOCKS[round(error * scale)] for error in report.stream_error)
    last = report.stream_error[-1] if report.stream_error else 0.0
    yield (
        f"split     {drawn} stream error by layer: at most {top:.1%} of the dense stream's energy, "
        f"{last:.1%} at the end"
    )


def sensitivity_lines(found: Sensitivity) -> Iterator[str]:
    """Yield what splitting each layer alone does to the model, drawn on a logarithmic scale."""
    low, high = max(min(found.kl), 1e-9), max(*found.kl, 1e-9)
    scale = (len(BLOCKS) - 1) / max(math.log(high / low), 1e-9)
    drawn = "".join(BLOCKS[round(scale * math.log(max(kl, low) / low))] for kl in found.kl)
    yield (
        f"layers    {drawn} KL of a token with that layer alone split: {low:.2g} to {high:.2g} "
        f"nats; the bar is {found.bar:.2g}"
    )
    kept = ", ".join(f"{layer} ({found.kl[layer]:.2g})" for layer in found.dense_layers)
    yield f"          left dense: {kept or 'none, for no layer stands out'}"


def verify_section(report: VerifyReport) -> dict[str, Any]:
    """Return the JSON section of a verification; what was not measured is left out."""
    return report.model_dump(exclude_none=True)


def plan_sections(plan: Plan) -> dict[str, Any]:
    """Return the JSON sections of a plan."""
    from moe_convert.convert import source_info, target_info

    estimate = plan.estimate
    target = target_info(plan).model_dump()
    target["path"] = str(plan.output)
    target["files"] = [{"path": s.file, "size": s.num_bytes} for s in plan.shards]
    target["tensors"] = [
        {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in plan.specs
    ]
    pushes = plan.recipe.push.repo_id is not None
    return {
        **({"push": plan.recipe.push.model_dump()} if pushes else {}),
        "source": source_info(plan).model_dump(),
        "target": target,
        "estimate": {
            "download_bytes": estimate.download_bytes,
            "ram_bytes": estimate.ram_bytes,
            "verify_ram_bytes": estimate.verify_ram_bytes,
            "vram_bytes": 0,
            "disk_bytes": estimate.disk_bytes,
            "time_s": list(estimate.time_s),
            "fits": estimate.fits,
            "assumptions": [
                "disks write 0.2 to 2 GB/s",
                "models run on the CPU with 20 to 500 GFLOP/s",
            ],
        },
        "engines": {name: list(notes) for name, notes in plan.engines.items()},
        **({"densest": _densest_section(plan.densest)} if plan.densest else {}),
        "devices": [asdict(row) for row in plan.devices],
        "warnings": [{"code": n.code, "message": n.message, "hint": n.hint} for n in plan.warnings],
    }


def _densest_section(plan: Plan) -> dict[str, Any]:
    """Return what the result has at most where a measurement decides which layers stay dense."""
    return {
        "num_dense_layers": len(plan.shape.dense_layers),
        "params_total": plan.params_total,
        "params_active": plan.params_active,
    }


def manifest_sections(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return the JSON sections of a finished folder."""
    sections: dict[str, Any] = {
        "source": manifest.source.model_dump(),
        "target": {**manifest.target.model_dump(), "path": str(folder)},
        "artifacts": {"model": str(folder), "manifest": str(folder / "moe_convert.json")},
        "warnings": [note.model_dump() for note in manifest.warnings],
    }
    if manifest.card_sha256 is not None:
        sections["artifacts"]["card"] = str(folder / "README.md")
    if manifest.routing is not None:
        sections["routing"] = manifest.routing.model_dump()
    if manifest.sensitivity is not None:
        sections["sensitivity"] = manifest.sensitivity.model_dump()
    if manifest.split is not None:
        sections["split"] = manifest.split.model_dump()
    if manifest.verify is not None:
        sections["verify"] = verify_section(manifest.verify)
    if manifest.calibration is not None:
        sections["calibration"] = manifest.calibration.model_dump()
    return sections


def quiet_libraries(verbose: int, log_file: Path | None) -> None:
    """Keep other libraries' messages and bars off the terminal, and log where it was asked for."""
    if not verbose:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbose > 1 else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logger = logging.getLogger("moe_convert")
    logger.setLevel(logging.DEBUG if log_file else level)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if verbose else []
    if log_file:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


def quiet_hub(output: Output) -> None:
    """Keep the Hub library's warnings off the terminal, and its bars where nobody watches them."""
    from huggingface_hub.utils import logging as logs
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not (output.human and output.show_progress):
        disable_progress_bars()
    if not output.verbose:
        logs.set_verbosity(logging.ERROR)
