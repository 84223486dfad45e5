"""Splitting against its peers: perplexity after loading, for every strategy, fit and share.

    python benchmarks/split.py --source MODEL --work DIR --data DIR [--device cuda] [--part 1/2]

Calibration is 64 rows of 1,024 tokens, evaluation all whole rows of each text (`--eval-rows` at
most), in fp32. `--data` holds `calibration.*` and `eval-NAME.*` files of text or JSON lines. Every
row is a conversion through the package, loaded with plain transformers afterwards. `static` is the
control: the neurons with the largest energy, always on, fitted in the same way as the split beside
it, with no routing; the mean compensation of FLAP (arXiv 2312.11983) is left out where the
architecture has no place for a bias.

What was tried, simulated by masking the dense FFN of SmolLM2-135M-Instruct at 25 % active, 64
parts, mixed calibration, one seed, one H200; perplexity of WikiText-2 / code / C4, 48 rows each:

    dense                                                        24.2 /  8.3 /  28.6
    static pruning, refit                                         182 / 38.5 /   332
    static pruning, 32 steps of descent and refit                 146 / 30.9 /   257
    clusters by contribution, cross-entropy router, refit         104 / 26.0 /   161
    ... nothing fitted                                            508 /  161 /   707
    ... clusters by predicted contribution (kept)                  93 / 23.4 /   142
    ... 32 steps of descent on the layer's own error (kept)        88 / 21.7 /   130
    ... 100 such steps (too slow for a CPU by default)             79 / 20.1 /   113
    ... 200 steps, the router too, straight-through                75 / 18.8 /   103
    ... 4 shared of the 16 that fire                              110 / 28.2 /   163
    ... 10 shared of the 16                                       106 / 25.3 /   160
    ... an absolute threshold at a mean of 7.2 routed experts     114 / 28.1 /   178
    ... tokens weighed by the inverse energy of their stream      163 / 43.6 /   251

The last row, and these, leave the few neurons behind massive activations unshared, because energy
was weighed too: router onto each token's best experts 238, by ridge regression 175, onto the gain
of adding each expert 178, fitted three times in turn with `down` 118 (WikiText-2).

Of a real model of 260k parameters (stories260k, 43 parts, half active, one CPU), after loading, on
WikiText-2's test text and C4: contribution and refit 131.9 / 67.6; learned, nothing fitted 100.1 /
64.2, and refit 132.8 / 72.1, from random groups 108.0 / 72.1, at ten times the rate 108.9 / 74.9.
An absolute threshold at the same mean number of experts, with a refit: 112.7 on WikiText-2 and 90.3
on Shakespeare against 111.4 and 91.0, one text each way. Of SmolLM2 at 25 %, made by the package,
it wins on all three texts (96 rows, refit: 94.6 / 9.6 / 134.7 against 103.8 / 11.4 / 142.5); the
simulation above, with descent, said the opposite. Engines compute its zeros: a fixed number is the
default.

Layers 2, 7, …, 27 of SmolLM2 by themselves at 25 %, 64 parts, refit, dense inputs: the share of the
output's energy that is missed on 8,192 tokens beside the 32,768 that were fitted, mean of the six:

    as it is                                                          0.195
    predictions whitened before they are clustered                    0.221
    inputs not whitened before contributions are predicted            0.198
    neurons shared by their energy in the whitened output             0.195
    a gain for each expert, by least squares, after the refit         0.195
    nothing fitted, and a gain for each expert                        0.291, 0.290
    of the 16 that fire, 0, 4, 12 or 14 shared (8 as it is)           0.213, 0.199, 0.197, 0.202
    the best even number by layer, which is 2 to 12                   0.194

So none was kept; stock types have one number of shared neurons for all layers anyway.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controls import counts, split_to, static

SHARES = (0.25, 0.5, 0.75)
FITS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "local": [{"edit": "refit", "streams": "local"}],
    "two": [{"edit": "refit"}],
    "tuned": [{"edit": "tune"}, {"edit": "refit"}],
}
STRATEGIES = (
    "contribution",
    "cmoe",
    "expertweaver",
    "gradient",
    "learned",
    "coactivation",
    "weights",
    "random",
    "contiguous",
)


def rows_of(data: Path) -> dict[str, Path]:
    """Return the texts to evaluate on, by name."""
    return {path.stem.removeprefix("eval-"): path for path in sorted(data.glob("eval-*"))}


def perplexity(model: Any, ids_BT: Any) -> float:
    """Return the perplexity over whole rows."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for part_BT in ids_BT.split(8):
            part = part_BT.to(model.device)
            logits = model(part).logits[:, :-1].flatten(0, 1).float()
            wanted = part[:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            count += wanted.numel()
    return math.exp(total / count)


def measure(folder: Path, texts: dict[str, Any], device: str) -> dict[str, float]:
    """Return perplexities of a folder loaded as a user does, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return {name: perplexity(model, ids_BT) for name, ids_BT in texts.items()}


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the recipe fields of every conversion."""
    for active in args.active:
        for units in args.units:
            name = f"{active:.0%} E={units}"
            for strategy in args.strategies:
                fits = [*args.fits, *(["tuned"] if strategy in args.tuned else [])]
                for fit, select in itertools.product(fits, args.select):
                    fields = {**counts(active, units), "experts.strategy": strategy}
                    fields |= {"router.select": select, "experts.edits": FITS[fit]}
                    yield f"{name} {strategy} {fit} {select}".removesuffix(" topk"), fields
            for fit in args.static_fits:
                fields = {**static(active, units), "experts.strategy": "contribution"}
                yield f"{name} static {fit}", fields | {"experts.edits": FITS[fit]}


def run(name: str, fields: dict[str, Any], args: argparse.Namespace) -> tuple[Path, float, Any]:
    """Convert; return the folder, the seconds it took and the manifest."""
    folder = args.work / name.replace(" ", "-").replace("%", "")
    shutil.rmtree(folder, ignore_errors=True)
    places = {
        "source.model": args.source,
        "data.train": str(next(iter(sorted(args.data.glob("calibration.*"))))),
        "data.max_tokens": args.tokens,
        "target.architecture": args.target,
        "runtime.device": args.device,
    }
    start = time.monotonic()
    manifest = split_to(folder, {**places, **fields}, muted=" static " in name)
    return folder, time.monotonic() - start, manifest


def settings(args: argparse.Namespace) -> list[str]:
    """Return what every row depends on beside its name."""
    return [str(args.source), str(args.data), args.target, str(args.tokens), str(args.eval_rows)]


def rows_made(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of an earlier run with the same settings."""
    if not (args.json and args.json.exists()):
        return {}
    found: dict[str, Any] = json.loads(args.json.read_text())
    if found.get("settings") != settings(args):
        raise SystemExit(f"{args.json} has rows of other settings; give another file.")
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--target", default="glm4_moe")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--eval-rows", type=int, default=10**6)
    parser.add_argument("--active", type=float, nargs="+", default=SHARES)
    parser.add_argument("--units", type=int, nargs="+", default=[64])
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--fits", nargs="*", choices=FITS, default=["none", "local", "two"])
    parser.add_argument("--tuned", nargs="*", default=["contribution"], help="tuned as well")
    parser.add_argument("--select", nargs="+", default=["topk"], help="topk, threshold or both")
    parser.add_argument("--static-fits", nargs="*", choices=FITS, default=["two", "tuned"])
    parser.add_argument("--part", default="1/1", help="every N-th row from the M-th on, as M/N")
    parser.add_argument("--json", type=Path, help="rows that are there are not made again")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    return parser.parse_args()


def main() -> None:
    """Print a line per conversion, and the whole as JSON at the end."""
    args = arguments()
    warnings.filterwarnings("ignore", "Pydantic serializer")  # Mute is no part of recipes

    from moe_convert.checkpoint import open_source
    from moe_convert.data import Data, token_ids
    from moe_convert.runtime import chosen_device

    args.device = chosen_device(args.device)
    source, began = open_source(args.source).fetch(), time.monotonic()
    texts = {}
    for name, path in rows_of(args.data).items():
        data = Data(train=str(path), max_tokens=10**7, shuffle_seed=None)
        texts[name] = token_ids(data, source.folder, 10**9)[: args.eval_rows]
    dense = measure(Path(source.folder or ""), texts, args.device)
    known = rows_made(args)
    results: dict[str, Any] = {**known, "dense": dense, "settings": settings(args)}
    print(f"{'':36}" + "".join(f"{name:>10}" for name in texts) + f"{'seconds':>9}")
    print(f"{'dense':36}" + "".join(f"{value:10.2f}" for value in dense.values()), flush=True)
    number, parts = map(int, args.part.split("/"))
    for name, fields in list(jobs(args))[number - 1 :: parts]:
        if name in known:
            continue
        if time.monotonic() - began > args.stop_after:
            print(f"stopped after {args.stop_after:.0f} s: {name} and what follows is missing")
            break
        folder, seconds, manifest = run(name, fields, args)
        found = measure(folder, texts, args.device)
        shutil.rmtree(folder)
        errors = manifest.split.stream_error if manifest.split else []
        results[name] = {**found, "seconds": seconds, "stream_error": errors}
        line = "".join(f"{value:10.2f}" for value in found.values())
        print(f"{name:36}{line}{seconds:9.1f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak RSS {peak:.0f} MB")


if __name__ == "__main__":
    main()
