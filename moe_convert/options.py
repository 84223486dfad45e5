"""The options of `upcycle` and `plan` as a table: which recipe field each one sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
        'Layers to convert: all, "4:", "::2" or "0,2,5" (default: all).',
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
    "token": Choice(
        (), str, "--token", "Hub token; `hf auth login` or HF_TOKEN are safer.", "Source"
    ),
    "strategy": Choice(
        ("experts.strategy",), str, "--strategy", "split: contiguous or random.", "Experts"
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
        "auto, zeros, normal, orthogonal, centroid or prompts.",
        "Router",
    ),
    "router_std": Choice(
        ("router.logit_std",),
        float,
        "--router-std",
        "Standard deviation of the router's logits (default: 0.5).",
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
        "Text that routers are made and measured on: a .txt, .jsonl or .parquet file, a glob, or "
        "org/name on the Hub (default: a short built-in text).",
        "Data",
    ),
    "text_field": Choice(
        ("data.text_field",),
        str,
        "--text-field",
        "Field of a JSON line or table that holds the text (default: text).",
        "Data",
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
    "verify": Choice(
        ("verify.enabled",),
        bool,
        "--verify/--no-verify",
        "Load the result and compare it with the dense model (default).",
        "Result",
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

    changes: dict[str, Any] = dict(_setting(pair) for pair in values["set_"] or [])
    if values["source"] is not None:
        changes["source.model"] = values["source"]
    for name, choice in CHOICES.items():
        if values[name] is not None:
            _apply(changes, choice, values[name])
    if values["source_expert"]:
        changes.setdefault("experts.method", "compose")
    if values["recipe"]:
        return load_recipe(values["recipe"], changes)
    if "source.model" not in changes:
        raise UsageError("No SOURCE was given.", "Give a checkpoint, or a recipe with -r.")
    return build_recipe({"schema": SCHEMA}, changes)


def _apply(changes: dict[str, Any], choice: Choice, value: Any) -> None:
    for field in choice.fields:
        if field.endswith("[]"):
            given = value if isinstance(value, list) else [value]
            changes.setdefault(field, []).extend(choice.wrap(one) for one in given)
        else:
            changes[field] = value


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
