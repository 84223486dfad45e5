"""The options of `upcycle` and `plan` as a table: which recipe field each one sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moe_convert.errors import UsageError

if TYPE_CHECKING:
    from moe_convert.recipe import Recipe


class Choice(NamedTuple):
    """One option: the recipe fields that it sets, its type, flags, help and panel.

    A field that ends in [] is a list, to which `wrap` of the value is added.
    """

    fields: tuple[str, ...]
    kind: type
    flags: str
    text: str
    panel: str | None = None
    wrap: Callable[[Any], Any] = lambda value: value

    @property
    def annotation(self) -> Any:
        """The option as Typer wants it; what is not given stays None."""
        option = typer.Option(*self.flags.split(), help=self.text, rich_help_panel=self.panel)
        return Annotated[self.kind | None, option]


SOURCE_HELP = (
    "Dense checkpoint: a folder, org/name or org/name@rev, a .gguf file or package://PACKAGE/FILE. "
    "Optional with a recipe."
)

CHOICES: dict[str, Choice] = {
    "recipe": Choice((), str, "-r --recipe", "Recipe: a gallery name or a file."),
    "output": Choice(("output.dir",), str, "-o --output", "Output folder."),
    "target": Choice(
        ("target.architecture",),
        str,
        "--target",
        "MoE architecture: auto, one of `archs ls`, or custom (own code beside the weights).",
    ),
    "experts": Choice(("target.num_experts",), int, "-e --experts", "Routed experts (default: 8)."),
    "top_k": Choice(("target.top_k",), int, "-k --top-k", "Experts per token (default: 2)."),
    "method": Choice(
        ("experts.method",),
        str,
        "--method",
        "How experts are made: clone, split, shared-residual or compose.",
    ),
    "shared_experts": Choice(
        ("target.shared_experts",),
        int,
        "--shared-experts",
        "Always-on experts, in units of the expert size (default: 0).",
    ),
    "layers": Choice(
        ("target.layers",),
        str,
        "--layers",
        'Layers to convert: all, "4:", "::2" or "0,2,5" (default: all); auto: a split measures '
        "first which layers it hurts most, and leaves those dense.",
    ),
    "dtype": Choice(("target.dtype",), str, "--dtype", "auto (as the source), bf16, fp16 or fp32."),
    "dry_run": Choice((), bool, "--dry-run", "Only plan."),
    "set_": Choice((), list[str], "--set", "KEY=VALUE for any recipe field.", "Recipe"),
    "revision": Choice(
        ("source.revision",),
        str,
        "--revision",
        "Branch, tag or commit of a Hub source (default: main).",
        "Source",
    ),
    "download": Choice(
        ("source.download",),
        bool,
        "--download/--no-download",
        "Keep a Hub source's weights in the cache (default), or read them layer by layer and never "
        "on disk.",
        "Source",
    ),
    "token": Choice(
        (), str, "--token", "Hub token; `hf auth login` or HF_TOKEN are safer.", "Source"
    ),
    "active": Choice(
        ("target.active",),
        float,
        "--active",
        "split: share of the FFN that fires, in place of the three counts.",
        "Experts",
    ),
    "strategy": Choice(
        ("experts.strategy",),
        str,
        "--strategy",
        "split: contribution (default), coactivation, cmoe, expertweaver, gradient, learned, "
        "weights, random or contiguous.",
        "Experts",
    ),
    "refit": Choice(
        ("experts.edits",),
        bool,
        "--refit/--no-refit",
        "split: solve `down` by least squares, and nothing else; or leave all values as they are "
        "(default: what the strategy does).",
        "Experts",
        lambda wanted: [{"edit": "refit"}] if wanted else [],
    ),
    "granularity": Choice(
        ("experts.granularity",),
        int,
        "--granularity",
        "clone: experts that one copy of the FFN is cut into (default: 1).",
        "Experts",
    ),
    "noise": Choice(
        ("experts.edits[]",),
        float,
        "--noise",
        "Add noise of this size, relative to each matrix's spread.",
        "Experts",
        lambda std: {"edit": "noise", "std": std},
    ),
    "drop_ratio": Choice(
        ("experts.edits[]",),
        float,
        "--drop-ratio",
        "Re-initialise this share of every expert's neurons.",
        "Experts",
        lambda ratio: {"edit": "drop", "ratio": ratio},
    ),
    "source_expert": Choice(
        ("experts.sources[]",),
        list[str],
        "--source-expert",
        "compose: MODEL[@REV][=PROMPTFILE], a checkpoint or LoRA folder whose FFN becomes an "
        "expert; repeat it. The file has a prompt per line.",
        "Experts",
        lambda text: _source_expert(text),
    ),
    "seed": Choice(
        ("experts.seed", "router.seed"),
        int,
        "--seed",
        "Decides everything random (default: 0).",
        "Experts",
    ),
    "router": Choice(
        ("router.init",),
        str,
        "--router",
        "auto, zeros, normal, orthogonal, centroid or prompts; for a split also distill, ridge, "
        "mean-gate, representative or grouped.",
        "Router",
    ),
    "router_std": Choice(
        ("router.logit_std",),
        float,
        "--router-std",
        "Standard deviation of the router's logits (default: 0.5).",
        "Router",
    ),
    "select": Choice(
        ("router.select",),
        str,
        "--select",
        "split: topk, or threshold: as many experts as lie above a layer's threshold, --top-k on "
        "average, in targets with a selection bias (default: topk).",
        "Router",
    ),
    "balance_router": Choice(
        ("router.balance",),
        float,
        "--balance-router",
        "split: bias the choice until no expert gets more than its share by this, such as 0.03 "
        "(default: off; it costs quality).",
        "Router",
    ),
    "measure": Choice(
        ("router.measure",),
        bool,
        "--measure/--no-measure",
        "Set it on the dense model's hidden states (default), or work it out from the norms.",
        "Router",
    ),
    "data": Choice(
        ("data.train",),
        str,
        "--data",
        "Text that routers are made and measured on: a .txt, .jsonl or .parquet file, a glob, "
        "org/name on the Hub, self (the source writes it) or self:TEXT (and continues pieces of "
        "that) (default: a short built-in text).",
        "Data",
    ),
    "text_field": Choice(
        ("data.text_field",),
        str,
        "--text-field",
        "Field of a JSON line or table that holds the text (default: text).",
        "Data",
    ),
    "calibrate": Choice(
        ("calibration.enabled",),
        bool,
        "--calibrate/--no-calibrate",
        "Train the result a little (default: splits, where there is a GPU).",
        "Calibration",
    ),
    "train": Choice(
        ("calibration.train",),
        str,
        "--train",
        "What is trained: router, experts, norms, joined by +, or all (default: by method).",
        "Calibration",
    ),
    "objective": Choice(
        ("calibration.objective",),
        str,
        "--objective",
        "Loss terms of weight one, joined by +: distill, hidden, lm, aux, z (default: by method); "
        "none: only --bias-update.",
        "Calibration",
        lambda text: _objective(text),
    ),
    "aux_coef": Choice(
        ("calibration.objective.aux",),
        float,
        "--aux-coef",
        "Weight of the load balance of every layer.",
        "Calibration",
    ),
    "z_coef": Choice(
        ("calibration.objective.z",),
        float,
        "--z-coef",
        "Weight of the squared log-sum-exp of router logits.",
        "Calibration",
    ),
    "bias_update": Choice(
        ("calibration.bias_update",),
        float,
        "--bias-update",
        "Loss-free balancing: step of the selection biases, in proportion to the spread of scores "
        "and as given where that is 0.2; 0.001 is usual (default: 0).",
        "Calibration",
    ),
    "dense_router": Choice(
        ("calibration.dense_router",),
        bool,
        "--dense-router/--no-dense-router",
        "Straight-through router gradient from all experts (default: for splits whose experts are "
        "so narrow that it costs nothing).",
        "Calibration",
    ),
    "max_tokens": Choice(
        ("calibration.max_tokens",),
        int,
        "--max-tokens",
        "Tokens to train on (default: 2000000, without a GPU 131072).",
        "Calibration",
    ),
    "max_steps": Choice(
        ("calibration.max_steps",), int, "--max-steps", "Stop after so many steps.", "Calibration"
    ),
    "seq_len": Choice(
        ("data.seq_len",), int, "--seq-len", "Tokens of a row (default: 1024).", "Calibration"
    ),
    "batch_size": Choice(
        ("calibration.batch_size",),
        int,
        "--batch-size",
        "Rows of a step, over all processes (default: 8192 tokens).",
        "Calibration",
    ),
    "grad_accum": Choice(
        ("calibration.grad_accum",),
        int,
        "--grad-accum",
        "Parts that a process's rows are cut into (default: 1).",
        "Calibration",
    ),
    "lr": Choice(
        ("calibration.optimizer.lr",),
        float,
        "--lr",
        "Learning rate of the experts; routers multiply it by 10, those of splits by 0.1 "
        "(default: by method).",
        "Calibration",
    ),
    "grad_checkpointing": Choice(
        ("calibration.gradient_checkpointing",),
        bool,
        "--grad-checkpointing/--no-grad-checkpointing",
        "Compute layers twice to save memory (default: if a step would not fit).",
        "Calibration",
    ),
    "compile": Choice(
        ("calibration.compile",),
        bool,
        "--compile/--no-compile",
        "Compile the layers first, which takes a C++ compiler and a minute or two; then steps on a "
        "GPU are faster (default: no).",
        "Calibration",
    ),
    "mixed_precision": Choice(
        ("calibration.mixed_precision",),
        str,
        "--mixed-precision",
        "auto, no, bf16 or fp16, with fp32 routers and optimiser (default: auto, bf16 on a GPU).",
        "Calibration",
    ),
    "parallel": Choice(
        ("calibration.parallel",),
        str,
        "--parallel",
        "What each of several processes holds: replicate (all, default), fsdp (a part of every "
        "tensor) or experts (as fsdp, and some experts).",
        "Calibration",
    ),
    "save_every": Choice(
        ("calibration.save_every",),
        int,
        "--save-every",
        "Steps between checkpoints (default: 200, and after five minutes at the latest).",
        "Calibration",
    ),
    "tracker": Choice(
        ("calibration.trackers[]",),
        list[str],
        "--tracker",
        "trackio, tensorboard or wandb; repeat it for several.",
        "Calibration",
    ),
    "max_ppl_ratio": Choice(
        ("calibration.guards.max_ppl_ratio",),
        float,
        "--max-ppl-ratio",
        "Fail (exit code 5) above this perplexity over the dense model's.",
        "Calibration",
    ),
    "max_dead": Choice(
        ("calibration.guards.max_dead_share",),
        float,
        "--max-dead",
        "Fail (exit code 5) above this share of dead experts.",
        "Calibration",
    ),
    "device": Choice(
        ("runtime.device",),
        str,
        "--device",
        "auto (a GPU if there is one), cpu or cuda.",
        "Runtime",
    ),
    "offload_dir": Choice(
        ("runtime.offload_dir",),
        str,
        "--offload-dir",
        "split: folder on whose disk the hidden states live, not in memory.",
        "Runtime",
    ),
    "max_shard_size": Choice(
        ("output.max_shard_size",),
        str,
        "--max-shard-size",
        "Largest file (default: 5GB).",
        "Result",
    ),
    "compat": Choice(
        ("output.compat",),
        bool,
        "--compat/--no-compat",
        "Also write older config keys and an explicit lm_head (default).",
        "Result",
    ),
    "card": Choice(
        ("output.card",),
        bool,
        "--card/--no-card",
        "Write README.md, the model card (default).",
        "Result",
    ),
    "license": Choice(
        ("output.license",),
        str,
        "--license",
        "Licence of the result, a Hub id such as apache-2.0 (default: that of the sources).",
        "Result",
    ),
    "verify": Choice(
        ("verify.enabled",),
        bool,
        "--verify/--no-verify",
        "Load the result and compare it with the dense model (default).",
        "Result",
    ),
    "push": Choice(
        ("push.repo_id",),
        str,
        "--push",
        "Publish the result as org/name on the Hub; login and rights are checked first.",
        "Publish",
    ),
    "private": Choice(
        ("push.private",),
        bool,
        "--private/--public",
        "Default: private if the repository is new, as it is if it exists.",
        "Publish",
    ),
    "create_pr": Choice(
        ("push.create_pr",),
        bool,
        "--create-pr",
        "Open a pull request instead of committing.",
        "Publish",
    ),
    "branch": Choice(("push.branch",), str, "--branch", "Branch, made if missing.", "Publish"),
    "commit_message": Choice(
        ("push.commit_message",), str, "--commit-message", "Title of the commit.", "Publish"
    ),
    "prune": Choice(
        ("push.prune",),
        bool,
        "--prune/--no-prune",
        "Delete what an earlier push left and the result no longer has (default).",
        "Publish",
    ),
    "yes": Choice((), bool, "-y --yes", "Do not ask.", "Result"),
    "overwrite": Choice(
        ("output.overwrite",),
        bool,
        "--overwrite",
        "Replace an output folder that moe-convert wrote.",
        "Dangerous options",
    ),
    "force": Choice((), bool, "--force", "Go on although it does not fit.", "Dangerous options"),
}
"""Every option by parameter name; those without a panel are what most people need."""


def conversion(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command SOURCE and every option of the table, and pass it their values by name."""

    def run(out: Any, /, **values: Any) -> None:
        function(out, values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    source = Annotated[str | None, typer.Argument(help=SOURCE_HELP)]
    parameters = [
        inspect.Parameter("out", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("source", keyword, annotation=source, default=None),
    ]
    for name, choice in CHOICES.items():
        parameters.append(
            inspect.Parameter(name, keyword, annotation=choice.annotation, default=None)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = function.__doc__
    return run


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Merge recipe, --set and options, in rising order of precedence.

    Raises:
        UsageError: nothing names a source, or a value is invalid.
    """
    from moe_convert.recipe import SCHEMA, build_recipe, load_recipe

    changes = changes_from(values, CHOICES)
    if values["source"] is not None:
        changes["source.model"] = values["source"]
    if values["source_expert"]:
        changes.setdefault("experts.method", "compose")
    if values["recipe"]:
        return load_recipe(values["recipe"], changes)
    if "source.model" not in changes:
        raise UsageError("No SOURCE was given.", "Give a checkpoint, or a recipe with -r.")
    return build_recipe({"schema": SCHEMA}, changes)


def changes_from(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the recipe fields that --set and these options change."""
    changes: dict[str, Any] = dict(_setting(pair) for pair in values["set_"] or [])
    for name in names:
        if values[name] is not None:
            _apply(changes, CHOICES[name], values[name])
    return changes


def _apply(changes: dict[str, Any], choice: Choice, value: Any) -> None:
    for field in choice.fields:
        if field.endswith("[]"):
            given = value if isinstance(value, list) else [value]
            changes.setdefault(field, []).extend(choice.wrap(one) for one in given)
        else:
            changes[field] = choice.wrap(value)


def _objective(text: str) -> dict[str, float]:
    from moe_convert.calibration import exact_objective

    return exact_objective(text)


def _source_expert(text: str) -> dict[str, Any]:
    """Return the entry of `experts.sources` that MODEL[@REV][=PROMPTFILE] stands for."""
    from pathlib import Path

    model, _, file = (text, "", "") if Path(text).exists() else text.partition("=")
    entry: dict[str, Any] = {"model": model}
    if "@" in model and not Path(model).exists():
        entry["model"], _, entry["revision"] = model.partition("@")
    if file:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The prompts in {file} cannot be read: {error}.") from error
        entry["prompts"] = [line.strip() for line in lines if line.strip()]
    return entry


def _setting(pair: str) -> tuple[str, Any]:
    import yaml

    key, separator, text = pair.partition("=")
    if not separator:
        raise UsageError(f"--set {pair} is not KEY=VALUE.")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        return key, text
