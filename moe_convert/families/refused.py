"""Model types that no row converts, and why: what a user sees in place of a bare refusal."""

from __future__ import annotations

UNGATED = "its FFN has no gate"
MULTIMODAL = (
    "it is multimodal and no row converts it as a whole; its text decoder would have to be saved "
    "as a checkpoint of its own first"
)
MULTIMODAL_TYPES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "mistral3",
    "gemma3",
    "llava",
    "llava_next",
    "llava_onevision",
    "cohere2_vision",
    "aya_vision",
    "paligemma",
    "idefics3",
    "smolvlm",
)

REFUSED: dict[str, str] = {
    "falcon": f"{UNGATED}, and it may have biases or ALiBi positions",
    "mpt": f"{UNGATED}, and its positions are ALiBi",
    "bloom": f"{UNGATED} and biases, and its positions are ALiBi",
    "gptj": f"{UNGATED} and biases, and runs in parallel with the attention",
    "codegen": f"{UNGATED} and biases, and runs in parallel with the attention",
    "gpt_neo": f"{UNGATED} and biases, and its positions are learned",
    "gpt_bigcode": f"{UNGATED} and biases, and its positions are learned",
    "persimmon": f"{UNGATED} and biases",
    "apertus": f"{UNGATED}, and its activation xIELU has parameters of its own",
    "bitnet": "its FFN norms its neurons before the down projection",
    "glm4v": "its text decoder normalises the output of attention and FFN too, as GLM-4-0414 does, "
    "and glm4v_moe has no such norms",
    "glm46v": "its text decoder is that of glm4v, which no stock MoE architecture holds",
    **dict.fromkeys(MULTIMODAL_TYPES, MULTIMODAL),
}
"""The reason by model type, as the end of a sentence."""


def refused_reason(model_type: str) -> str:
    """Return why a model type is refused, to follow a sentence; empty if nothing is known."""
    return f": {REFUSED[model_type]}" if model_type in REFUSED else ""
