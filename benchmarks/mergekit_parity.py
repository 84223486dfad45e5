"""The same mergekit-moe file built by mergekit-moe and by moe-convert, compared tensor by tensor.

python benchmarks/mergekit_parity.py --mergekit VENV/bin/mergekit-moe --work DIR

Random Llamas, Qwen2s and Qwen3s of a few MB are made first. Both results are loaded by
transformers, so that names on disk do not matter, and every tensor of the model is compared;
routers are drawn at random by both programs and only their spread is. Then ours gets mergekit's
routers and the logits are compared, so that the configurations are too. mergekit-moe 0.1.5 has to
be in a virtual environment of its own. Exit code 1 if a tensor outside the routers, or a logit,
differs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from convert import write_tokenizer

if TYPE_CHECKING:
    import torch

SIZES = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SHARED_DOWN = "shared_expert.down_proj.weight"
SHARED_GATE = 0.5
"""Our shared gate is the sigmoid of zero, which `down` makes up for; mergekit's is drawn."""
RANDOM_PARTS = ("mlp.gate.weight", "shared_expert_gate.weight")
NAMES = ("base", "code", "maths")


@dataclass(frozen=True)
class Job:
    """One file for mergekit-moe: a dense family and what goes into the file."""

    name: str
    family: str
    experts: tuple[tuple[str, dict[str, Any]], ...]
    keys: dict[str, Any]
    shared: dict[str, Any] | None = None

    def file(self, models: Path) -> dict[str, Any]:
        """Return the file's content."""
        place = models / self.family
        listed = [{"source_model": str(place / name), **more} for name, more in self.experts]
        file = {"base_model": str(place / "base"), "gate_mode": "random", "experts": listed}
        if self.shared is not None:
            file["shared_experts"] = [{"source_model": str(place / "base"), **self.shared}]
        return {**file, **self.keys}


THREE = tuple((name, dict[str, Any]()) for name in NAMES)
JOBS = (
    Job("clones", "llama", (("base", {}),) * 4, {"dtype": "float32"}),
    Job("three models", "llama", THREE, {"dtype": "float32"}),
    Job("rounded to bf16", "llama", THREE, {"dtype": "bfloat16"}),
    Job(
        "residual scale",
        "llama",
        (("base", {}), ("code", {"residual_scale": 0.75}), ("maths", {"residual_scale": 0.1})),
        {"dtype": "float32", "experts_per_token": 3},
    ),
    Job("qwen3", "qwen3", THREE, {"dtype": "float32", "architecture": "qwen3"}),
    Job(
        "qwen2 with a shared expert",
        "qwen2",
        THREE,
        {"dtype": "float32", "architecture": "qwen"},
        {"residual_scale": 0.1},
    ),
)


def make_models(folder: Path) -> None:
    """Write three random models of each family."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    for family in sorted({job.family for job in JOBS}):
        config = CONFIG_MAPPING[family](**SIZES, head_dim=32)
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder / family / name)
            write_tokenizer(folder / family / name)


def load(folder: Path) -> Any:
    """Return the model, and say so if transformers does not find all its tensors."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        print(f"  {folder.name}: transformers misses {len(missing)} tensors, first {missing[0]}")
    return model.eval()


def logit_difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of the logits when both have mergekit's routers and gates."""
    import torch

    state = dict(ours.state_dict())
    for name, tensor in theirs.state_dict().items():
        if name.endswith(RANDOM_PARTS):
            state[name].copy_(tensor)
        elif name.endswith(SHARED_DOWN):
            state[name].mul_(SHARED_GATE)
    ids = torch.randint(SIZES["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((ours(ids).logits - theirs(ids).logits).abs().max())


def differences(
    ours: "dict[str, torch.Tensor]", theirs: "dict[str, torch.Tensor]"
) -> Iterator[tuple[str, str]]:
    """Yield name and reason of every tensor that differs, routers aside."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield name, "only in ours" if name in ours else "only in mergekit's"
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if name.endswith(RANDOM_PARTS):
            continue
        if name.endswith(SHARED_DOWN):
            one = one * SHARED_GATE
        if one.shape != other.shape or one.dtype != other.dtype:
            yield name, f"{one.dtype} {list(one.shape)}, {other.dtype} {list(other.shape)}"
        elif not one.equal(other):
            yield name, f"max difference {float((one - other).abs().max()):.2e}"


def spread(tensors: "dict[str, torch.Tensor]") -> str:
    """Return the std of all router weights."""
    import torch

    rows = [tensor.flatten() for name, tensor in tensors.items() if "mlp.gate.weight" in name]
    return f"{float(torch.cat(rows).float().std()):.3f}"


def compare(job: Job, models: Path, work: Path, mergekit: Path) -> bool:
    """Build one file with both programs; print and return whether the results agree."""
    slug = job.name.replace(" ", "-")
    file = work / f"{slug}.yml"
    file.write_text(yaml.safe_dump(job.file(models), sort_keys=False), encoding="utf-8")
    outputs = {"mergekit": work / f"{slug}-mergekit", "ours": work / f"{slug}-ours"}
    consent = "--i-understand-this-is-not-useful-without-training"
    mine = [sys.executable, "-m", "moe_convert", "upcycle", "-r", file, "-o", outputs["ours"]]
    for command in (
        [mergekit, file, outputs["mergekit"], "--random-seed", "0", consent],
        [*mine, "--no-verify", "-q"],
    ):
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    models_made = load(outputs["ours"]), load(outputs["mergekit"])
    ours, theirs = (model.state_dict() for model in models_made)
    found = list(differences(ours, theirs))
    num_compared = sum(not name.endswith(RANDOM_PARTS) for name in ours)
    std = f"router std {spread(ours)} ours, {spread(theirs)} mergekit"
    apart = logit_difference(*models_made)
    print(
        f"{job.name}: {num_compared} tensors compared, {len(found)} differ; {std}; with its "
        f"routers max |logit difference| {apart:.1e}"
    )
    for name, reason in found[:5]:
        print(f"  {name}: {reason}")
    return not found and apart == 0.0


def main() -> None:
    """Run every job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-moe's program")
    parser.add_argument("--work", type=Path, help="folder for everything that is made")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = chosen.work or Path(scratch)
        make_models(work / "models")
        equal = [compare(job, work / "models", work, chosen.mergekit) for job in JOBS]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
