"""The recipe: every choice of a conversion, validated field by field, as YAML and as options.

An unknown key is an error that names the nearest known one; nothing is ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from moe_convert.calibration import Calibration
from moe_convert.data import Data
from moe_convert.edits import Fit
from moe_convert.errors import UsageError
from moe_convert.experts import METHODS, STRATEGIES, Clone, ExpertsNode, Split
from moe_convert.mergekit import imported, is_mergekit
from moe_convert.routers import Router
from moe_convert.runtime import Runtime

SCHEMA: Final = "moe-convert/recipe/1"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
SPLIT_TOKENS = 65_536
"""Tokens that a split is fitted to by default."""
FLAT_STD = 2.0**-9
"""Spread of the logits that leaves the chosen experts' weights equal to about one percent.

Near 0.5 a sigmoid in fp32 still tells logits apart that differ by a ten-thousandth of it.
"""
MEASURED = "auto"
"""What `target.layers` says where a measurement decides which layers stay dense."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Section(BaseModel):
    """A part of the recipe; fields it does not define are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSection(Section):
    """The dense checkpoint."""

    model: str = Field(
        description="directory, org/name[@rev], hf://…, file.gguf or package://PACKAGE/FILE.gguf"
    )
    revision: str = Field("main", description="branch, tag or commit; the commit is recorded")
    download: bool = Field(
        True, description="false: read Hub tensors over the network, keep none of them on disk"
    )


class TargetSection(Section):
    """The architecture of the result and the number of its experts."""

    architecture: str = Field("auto", description="auto, or a name from `archs ls`")
    num_experts: int = Field(8, description="routed experts")
    top_k: int = Field(2, description="experts per token")
    shared_experts: int = Field(
        0, ge=0, description="always-on experts, in units of the expert size"
    )
    active: float | None = Field(
        None, gt=0, lt=1, description="split: share of the FFN that fires; sets all three counts"
    )
    layers: str | list[int] = Field(
        "all",
        description='all, a slice "4:", a list "0,2,5", or auto: a split leaves dense what it '
        "hurts most",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    num_groups: int = Field(1, ge=1, description="groups of adjacent experts")
    top_groups: int = Field(1, ge=1, description="groups that a token may use")
    max_positions: int | None = Field(None, ge=1, description="shorten the context length")

    @field_validator("layers")
    @classmethod
    def _valid_layers(cls, value: str | list[int]) -> str | list[int]:
        chosen_layers(value, 1 << 16)
        return value


class VerifySection(Section):
    """The check at the end: reload what was written and compare it with the dense model."""

    enabled: bool = True
    tolerance: float = Field(1e-4, gt=0, description="largest logit difference in fp32")
    prompts: list[str] = Field(default_factory=list, description="texts to continue greedily")


class OutputSection(Section):
    """Where and how the result is written."""

    dir: str | None = None
    overwrite: bool = False
    max_shard_size: str = "5GB"
    compat: bool = Field(True, description="also write older config keys and an explicit lm_head")
    card: bool = Field(True, description="write README.md, the model card")
    license: str = Field("inherit", description="inherit (from the sources), or a Hub licence id")

    @field_validator("max_shard_size")
    @classmethod
    def _valid_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @property
    def max_shard_bytes(self) -> int:
        """Shard size in bytes."""
        return parse_bytes(self.max_shard_size)


class PushSection(Section):
    """Where the result is published; nothing is uploaded without a `repo_id`."""

    repo_id: str | None = Field(None, description="org/name on the Hub")
    private: bool | None = Field(
        None, description="null: private if it is new, and as it is if it exists"
    )
    branch: str | None = Field(None, description="null: main; refs/pr/N: that pull request")
    create_pr: bool = Field(False, description="open a pull request instead of committing")
    commit_message: str | None = None
    prune: bool = Field(
        True, description="delete what an earlier push left and the result no longer has"
    )

    @field_validator("repo_id")
    @classmethod
    def _valid_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
            raise ValueError("a repository is named org/name")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> PushSection:
        if self.create_pr and self.branch not in {None, "main"}:
            raise ValueError("a pull request is opened against main, so branch has no effect")
        return self


class Recipe(Section):
    """One conversion."""

    model_config = ConfigDict(
        json_schema_extra={"$schema": DIALECT, "required": ["schema", "source"]}
    )

    schema_id: Literal["moe-convert/recipe/1"] = Field(SCHEMA, alias="schema")
    name: str | None = None
    description: str | None = None
    notes: list[str] = Field(
        default_factory=list, description="what to know before running it; shown as warnings"
    )
    source: SourceSection
    target: TargetSection = TargetSection()
    experts: ExpertsNode = Clone()
    router: Router = Router()
    data: Data = Data()
    calibration: Calibration = Calibration()
    runtime: Runtime = Runtime()
    verify: VerifySection = VerifySection()
    output: OutputSection = OutputSection()
    push: PushSection = PushSection()

    @field_validator("experts", mode="before")
    @classmethod
    def _clone_by_default(cls, value: Any) -> Any:
        return {"method": "clone", **value} if isinstance(value, dict) else value

    @model_validator(mode="wrap")
    @classmethod
    def _as_many_as_the_method_has(
        cls, value: Any, handler: ModelWrapValidatorHandler[Recipe]
    ) -> Recipe:
        """Take what the recipe does not say from its method: experts, and a split's defaults."""
        recipe = handler(value)
        wanted = recipe.experts.num_experts
        if wanted is not None and "num_experts" not in recipe.target.model_fields_set:
            target = recipe.target.model_copy(update={"num_experts": wanted})
            recipe = recipe.model_copy(update={"target": target})
        return _as_split(recipe) if isinstance(recipe.experts, Split) else recipe

    @property
    def carves(self) -> bool:
        """Whether a split's layers are made in memory, of weights or data, not just sliced."""
        method = self.experts
        if not isinstance(method, Split):
            return False
        fits = any(isinstance(edit, Fit) for edit in method.edits)
        made = self.router.fitted or self.router.steers
        return method.needs != "nothing" or made or fits

    @property
    def needs_input(self) -> bool:
        """Whether a model must be run before or while experts and routers are made."""
        return self.router.needs_input or self.carves

    def as_yaml(self) -> str:
        """Return the recipe with every default filled in."""
        data = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _as_split(recipe: Recipe) -> Recipe:
    """Fill in what a split's strategy does by default.

    With every expert chosen nothing is left to fit, and neutral routers make the result exact.
    """
    method, target = recipe.experts, recipe.target
    assert isinstance(method, Split)
    whole = target.active is None and target.top_k == target.num_experts
    router, data = dict[str, Any](), dict[str, Any]()
    if recipe.router.init == "auto":
        exact = whole and method.needs != "nothing"
        router["init"] = "zeros" if exact else method.router
        if recipe.router.thresholds:
            router["init"] = "ridge"
    if "edits" not in method.model_fields_set and not whole:
        method = method.model_copy(update={"edits": method.default_edits})
    updated = recipe.model_copy(
        update={"experts": method, "router": recipe.router.model_copy(update=router)}
    )
    if updated.router.fitted and "logit_std" not in recipe.router.model_fields_set:
        router["logit_std"] = FLAT_STD
    if updated.carves and recipe.data.train is None:
        data["train"] = "self"
    if updated.carves and "max_tokens" not in recipe.data.model_fields_set:
        data["max_tokens"] = SPLIT_TOKENS
    return updated.model_copy(
        update={
            "router": recipe.router.model_copy(update=router),
            "data": recipe.data.model_copy(update=data),
        }
    )


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB (powers of ten)."""
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no size; write for example 500MB or 5GB") from None
    if size < 1:
        raise ValueError(f"{text!r} is not positive")
    return size


def chosen_layers(layers: str | list[int], num_layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers that `all`, a slice, a list or "0,2,5" chooses.

    With `auto` they are those that may be chosen: all.

    Raises:
        ValueError: the text is none of these, or a number is outside the model.
    """
    if layers in ("all", MEASURED):
        return tuple(range(num_layers))
    if isinstance(layers, str) and ":" in layers:
        bounds = [int(part) if part.strip() else None for part in layers.split(":")]
        if len(bounds) > 3:
            raise ValueError(f"{layers!r} is no slice; write for example 4: or ::2")
        return tuple(sorted(range(num_layers)[slice(*bounds)]))
    try:
        numbers = [int(part) for part in layers.split(",")] if isinstance(layers, str) else layers
    except ValueError:
        raise ValueError(
            f"{layers!r} is neither all, nor auto, nor a slice (4:), nor a list (0,2,5)"
        ) from None
    outside = [n for n in numbers if not -num_layers <= n < num_layers]
    if outside:
        raise ValueError(f"layer {outside[0]} does not exist: the model has {num_layers}")
    return tuple(sorted({n % num_layers for n in numbers}))


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by gallery name or path and apply `changes` (dotted key to value).

    Raises:
        UsageError: it is not found, not YAML, or a field is unknown or invalid.
    """
    path = find_recipe(name)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not valid YAML: {_yaml_place(error)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read recipe {path.name}: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} is no recipe: it must be a mapping with a `schema` key.")
    if is_mergekit(data):
        data = imported(data)
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"{path.name} has schema {data.get('schema')!r}, expected {SCHEMA!r}.",
            f"Begin the file with `schema: {SCHEMA}`.",
        )
    return build_recipe(data, changes or {})


def import_recipe(path: Path, source_text: str) -> str:
    """Return a mergekit-moe file as the YAML of a recipe, with what differs as comments.

    Raises:
        UsageError: it is no such file, a key is unknown, or something cannot be expressed.
    """
    try:
        data = yaml.load(source_text, _UniqueKeys)  # noqa: S506
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not valid YAML: {_yaml_place(error)}.") from error
    if not isinstance(data, dict) or not is_mergekit(data):
        raise UsageError(
            f"{path.name} is no mergekit-moe file: it has no base_model.",
            "Recipes are used as they are, with -r.",
        )
    recipe = {**imported(data), "description": f"imported from the mergekit-moe file {path.name}"}
    build_recipe(recipe, {})
    ordered = {key: recipe.pop(key) for key in ("schema", "description", "notes")} | recipe
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


def build_recipe(data: dict[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """Validate recipe data after applying dotted changes.

    Raises:
        UsageError: a field is unknown, missing or invalid; the sentence names it.
    """
    for key, value in changes.items():
        node = data
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"{key} cannot be set: {part} is not a section.")
        if last.endswith("[]"):
            last = last.removesuffix("[]")
            value = [*(node.get(last) or []), *value]
        node[last] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    kinds = {"missing": 1, "extra_forbidden": -1}
    problem = min(error.errors(), key=lambda found: kinds.get(found["type"], 0))
    kinds_of_node = {*METHODS, *STRATEGIES}
    tags = {kind for kind in kinds_of_node if problem["loc"][:2] == ("experts", kind)}
    tags |= {"str", "HubDataset"} if problem["loc"][:2] == ("data", "train") else set()
    place = ".".join(str(part) for part in problem["loc"] if part not in tags)
    if problem["type"] == "extra_forbidden":
        owners = _owners(problem["loc"])
        if owners:
            return f"The recipe has no field {place} here: it belongs to {' and '.join(owners)}."
        plain = re.sub(r"\.\d+\b", "", place)
        near = difflib.get_close_matches(plain, list(_known_keys()), n=1, cutoff=0.5)
        return f"The recipe has no field {place}." + (f" Did you mean {near[0]}?" if near else "")
    if problem["type"] == "union_tag_invalid":
        wanted, split = problem["ctx"]["tag"], problem["input"].get("method") == "split"
        key, known = ("strategy", STRATEGIES) if split else ("method", METHODS)
        return f"{place}.{key}: {wanted!r} is not one of {', '.join(known)}."
    if problem["type"] == "missing":
        return f"The recipe needs {place}."
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}."


def _owners(place: tuple[int | str, ...]) -> list[str]:
    """Return the methods and strategies that have a field of `experts`."""
    nodes = {**METHODS, **STRATEGIES}
    inside = place[0] == "experts" and len(place) == 3
    return [name for name, node in nodes.items() if inside and place[-1] in node.model_fields]


def _known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        key = prefix + (info.alias or name)
        yield key
        methods = [*METHODS.values(), *STRATEGIES.values()]
        nodes = methods if name == "experts" else [info.annotation]
        for node in nodes:
            for part in (node, *get_args(node)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from _known_keys(part, key + ".")


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


def gallery() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    packaged = Path(str(resources.files("moe_convert"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or a gallery name.

    Raises:
        UsageError: neither exists.
    """
    known = gallery()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"Did you mean {near[0]}?" if near else "See `moe-convert recipes ls`."
    raise UsageError(f"There is no recipe {name!r}, neither as a file nor in the gallery.", hint)
