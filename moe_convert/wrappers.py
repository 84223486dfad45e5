"""Multimodal checkpoints: their text decoder is converted, everything around it goes through.

A row says which text decoders a model type may have inside, what each becomes, and what the whole
is called then. On the way in the text decoder gets Llama's names and a config of its own; on the
way out both get back into place. Towers, projectors and their configs are never decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint import Source
from moe_convert.checkpoint.names import full_config
from moe_convert.errors import UnsupportedError
from moe_convert.families import Body, Config, DenseFamily, find_family
from moe_convert.targets import TARGETS, MoeShape, MoeTarget
from moe_convert.targets.base import TRANSFORMERS, Engine, Trap, stacked

if TYPE_CHECKING:
    import torch

AROUND = "around."
"""Prefix of the tensors that are carried through, while the text decoder has Llama's names."""

SIBLING = {"model.": "model.language_model.", "lm_head.": "lm_head."}
NESTED = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""What Llama's prefixes are called inside: in Qwen's and Gemma's files, and in LLaVA's."""

Inputs = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Text:
    """One text decoder: the family it is read as, the target it becomes, what that differs in.

    `model_type` is the text part's in the sibling's config, where it is not the target's own.
    """

    family: str
    target: str
    model_type: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moe_type(self) -> str:
        """The model type of the text part of the result."""
        return self.model_type or self.target


@dataclass(frozen=True)
class Wrapper:
    """One multimodal model type and the one that it becomes, which may be the same.

    `texts` are the text decoders by the model type in the dense `text_config`, `names` what Llama's
    prefixes are called in the files, and `sub_types` the model types of the other parts, where the
    sibling has its own. `image` makes the inputs of a prompt with one image.
    """

    model_type: str
    moe_type: str
    architecture: str
    texts: Mapping[str, Text]
    names: Mapping[str, str]
    image: Callable[[Any], Inputs]
    sub_types: Mapping[str, str] = field(default_factory=dict)
    examples: str = ""


@dataclass(frozen=True)
class WrappedTarget(MoeTarget):
    """A target inside a multimodal model; `around` is the dense model's whole config.json."""

    text_type: str = field(kw_only=True)
    sub_types: Mapping[str, str] = field(kw_only=True)
    around: Config = field(kw_only=True)

    def config(self, body: Body, shape: MoeShape, untie: bool) -> dict[str, Any]:
        """Return the dense config with another text part; the rest of it stays as it is."""
        text = super().config(body, shape, untie)
        parts = {
            key: {**self.around[key], "model_type": model_type}
            for key, model_type in self.sub_types.items()
            if key in self.around
        }
        kept = {k: v for k, v in self.around.items() if k not in REPLACED}
        return {
            **kept,
            **parts,
            "text_config": {**text, "model_type": self.text_type},
            "tie_word_embeddings": text["tie_word_embeddings"],
        }

    @property
    def text_model_type(self) -> str:
        """The model type of the decoder alone."""
        return self.text_type

    def alone(self, name: str) -> str:
        """Return the name without the prefix that stands for the decoder."""
        for ours in ("model.", "lm_head."):
            if name.startswith(self.on_disk[ours]):
                return ours + name.removeprefix(self.on_disk[ours])
        return name

    def keeps_dtype(self, name: str) -> bool:
        """Everything outside the text decoder keeps its dtype."""
        inside = name.startswith(tuple(self.on_disk[ours] for ours in ("model.", "lm_head.")))
        return not inside or super().keeps_dtype(name)


REPLACED = frozenset({"model_type", "architectures", "torch_dtype", "dtype", "text_config"})


@dataclass(frozen=True)
class WrappedFamily(DenseFamily):
    """The text decoder of a multimodal checkpoint, and the target that it becomes."""

    wrapper: Wrapper = field(kw_only=True)
    target: WrappedTarget = field(kw_only=True)

    def opened(self, source: Source) -> Source:
        """Return the source as a text model whose other tensors have names of their own."""
        theirs = {new: old for old, new in self.wrapper.names.items()}
        tensors = {
            name if name.startswith(self.unused) else _renamed(name, theirs): ref
            for name, ref in source.tensors.items()
        }
        config = text_config(source.config, self.model_type)
        return replace(
            source, config=config, tensors=tensors, fetch=lambda: self.opened(source.fetch())
        )

    def path(self, opened: Mapping[str, Any]) -> str:
        """Say in a sentence which way this checkpoint takes."""
        carried = sum(name.startswith(AROUND) for name in opened)
        return (
            f"This {self.wrapper.model_type} becomes a {self.wrapper.moe_type}: its text decoder "
            f"is converted to {self.target.text_type}, and the {carried} tensors around it, their "
            "config and the processor files go through as they are."
        )


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return AROUND + name


def text_config(config: Config, model_type: str) -> dict[str, Any]:
    """Return the text part of a whole config.json as that of a model type, defaults filled in."""
    whole = full_config(config)
    return {
        **whole.text_config.to_dict(),
        "model_type": model_type,
        "tie_word_embeddings": whole.tie_word_embeddings,
    }


def find_wrapped(config: Config) -> tuple[WrappedFamily, Body] | None:
    """Return family and body of a multimodal checkpoint's text decoder; None for a text model.

    Raises:
        UnsupportedError: no row has this text decoder, or it cannot be converted.
    """
    model_type = str(config["model_type"])
    wrapper = next((row for row in WRAPPERS if row.model_type == model_type), None)
    if wrapper is None:
        return None
    inner = str(full_config(config).text_config.model_type)
    text = wrapper.texts.get(inner)
    if text is None:
        raise UnsupportedError(
            f"No MoE is proved to hold a {model_type} with a {inner} inside.",
            f"Supported inside: {', '.join(wrapper.texts)}.",
        )
    family, body = find_family(text_config(config, text.family))
    row = {f: getattr(family, f) for f in DenseFamily.__dataclass_fields__}
    target = _target(wrapper, text, config)
    row["targets"] = (target.model_type,)
    return WrappedFamily(**row, wrapper=wrapper, target=target), body


def _target(wrapper: Wrapper, text: Text, config: Config) -> WrappedTarget:
    row = {f: getattr(TARGETS[text.target], f) for f in MoeTarget.__dataclass_fields__}
    row |= text.changes
    row |= {
        "engines": tuple(_unchecked(engine) for engine in row["engines"]),
        "model_type": wrapper.moe_type,
        "architecture": wrapper.architecture,
        "on_disk": {AROUND: "", **wrapper.names},
    }
    return WrappedTarget(**row, text_type=text.moe_type, sub_types=wrapper.sub_types, around=config)


def _unchecked(engine: Engine) -> Engine:
    """Add to an engine's record that what is known of it was read for text models."""
    if engine.name == TRANSFORMERS.name:
        return engine
    unknown = Trap("whether it loads this multimodal type is not known")
    return replace(engine, traps=(*engine.traps, unknown))


def written_target(config: Config) -> WrappedTarget | None:
    """Return the target of a multimodal MoE's config.json; None if no row makes such a model."""
    inner = config.get("text_config") or {}
    for wrapper in WRAPPERS:
        for text in wrapper.texts.values():
            if (wrapper.moe_type, text.moe_type) == (config["model_type"], inner.get("model_type")):
                return _target(wrapper, text, config)
    return None


def image_inputs(config: Any) -> Inputs | None:
    """Return a prompt with one random image for a multimodal model's config; None for others."""
    for wrapper in WRAPPERS:
        if config.model_type in {wrapper.model_type, wrapper.moe_type}:
            return wrapper.image(config)
    return None


def special_tokens(config: Any) -> set[int]:
    """Return the ids of a multimodal config that stand for something other than a word."""
    if config.get_text_config() is config:
        return set()
    suffixes = ("_token_id", "_token_index")
    return {v for k, v in config.to_dict().items() if k.endswith(suffixes) and v is not None}


def _prompt(config: Any, num_image_tokens: int, **pixels: torch.Tensor) -> Inputs:
    """Put the placeholders of one image between a few ordinary tokens."""
    import torch

    special = special_tokens(config)
    words = [n for n in range(1, len(special) + 40) if n not in special][:16]
    image = [config.image_token_id] * num_image_tokens
    ids_BT = torch.tensor([words[:6] + image + words[6:]])
    return {"input_ids": ids_BT, **pixels}


def _random(*shape: int) -> torch.Tensor:
    import torch

    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def grid_image(config: Any) -> Inputs:
    """One image of 4 x 2 merged patches, as Qwen's vision towers take it."""
    import torch

    vision = config.vision_config
    merge = vision.spatial_merge_size
    grid = (1, 4 * merge, 2 * merge)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = _prompt(
        config,
        8,
        pixel_values=_random(grid[1] * grid[2], pixels),
        image_grid_thw=torch.tensor([grid]),
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return inputs


def pooled_image(config: Any) -> Inputs:
    """One image of 4 x 2 pooled patches, as Gemma 4 takes it."""
    import torch

    vision = config.vision_config
    side = vision.pooling_kernel_size
    rows, columns = torch.meshgrid(torch.arange(4 * side), torch.arange(2 * side), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)[None]
    inputs = _prompt(
        config,
        8,
        pixel_values=_random(1, places.shape[1], 3 * vision.patch_size**2),
        image_position_ids=places,
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return inputs


def tiled_image(config: Any) -> Inputs:
    """One tile of the tower's own size, as InternVL takes it."""
    vision = config.vision_config
    height, width = vision.image_size
    patches = (height // vision.patch_size[0]) * (width // vision.patch_size[1])
    tokens = int(patches * config.downsample_ratio**2)
    return _prompt(config, tokens, pixel_values=_random(1, vision.num_channels, height, width))


def flexible_image(config: Any) -> Inputs:
    """One image of 4 x 2 unshuffled patches, as LFM2-VL takes it."""
    import torch

    vision, factor = config.vision_config, config.downsample_factor
    shape = (4 * factor, 2 * factor)
    patches = shape[0] * shape[1]
    return _prompt(
        config,
        8,
        pixel_values=_random(1, patches, vision.num_channels * vision.patch_size**2),
        spatial_shapes=torch.tensor([shape]),
        pixel_attention_mask=torch.ones(1, patches, dtype=torch.long),
    )


def sized_image(config: Any) -> Inputs:
    """One image of 4 x 2 merged patches, as Pixtral's tower takes it."""
    import torch

    vision = config.vision_config
    side = vision.patch_size * config.spatial_merge_size
    size = (4 * side, 2 * side)
    pixels = _random(1, vision.num_channels, *size)
    return _prompt(config, 8, pixel_values=pixels, image_sizes=torch.tensor([size]))


FUSED = stacked("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

WRAPPERS = (
    Wrapper(
        "qwen3_5",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        texts={"qwen3_5_text": Text("qwen3_5_text", "qwen3_5_moe_text")},
        names=SIBLING,
        sub_types={"vision_config": "qwen3_5_moe_vision"},
        image=grid_image,
        examples="Qwen3.5 and Qwen3.6, 0.8B to 27B",
    ),
    Wrapper(
        "qwen3_vl",
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        texts={"qwen3_vl_text": Text("qwen3", "qwen3_moe", "qwen3_vl_moe_text", {"routed": FUSED})},
        names=SIBLING,
        sub_types={"vision_config": "qwen3_vl_moe_vision"},
        image=grid_image,
        examples="Qwen3-VL 2B to 32B",
    ),
    Wrapper(
        "gemma4",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        texts={"gemma4_text": Text("gemma4_text", "gemma4_text")},
        names=SIBLING,
        image=pooled_image,
        examples="Gemma 4 31B and others without a double-wide FFN",
    ),
    Wrapper(
        "internvl",
        "internvl",
        "InternVLForConditionalGeneration",
        texts={"qwen3": Text("qwen3", "qwen3_moe"), "qwen2": Text("qwen2", "qwen2_moe")},
        names=NESTED,
        image=tiled_image,
        examples="InternVL3 and InternVL3.5",
    ),
    Wrapper(
        "mistral3",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        texts={"mistral": Text("mistral", "mixtral"), "ministral3": Text("ministral3", "mixtral")},
        names=NESTED,
        image=sized_image,
        examples="Mistral Small 3.1 and 3.2, Ministral 3 up to its original context length",
    ),
    Wrapper(
        "lfm2_vl",
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        texts={"lfm2": Text("lfm2", "lfm2_moe")},
        names=SIBLING,
        image=flexible_image,
        examples="LFM2-VL 450M to 3B",
    ),
)
"""Every multimodal type that is converted; each text decoder in it is proved by a test."""
