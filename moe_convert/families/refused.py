"""Model types that no row converts, and why: what a user sees in place of a bare refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

KNOWN_UNTIL = (5, 24)
"""The newest transformers whose model types are all told apart; later ones get a general reason."""
UNGATED = "its FFN has no gate"
MULTIMODAL = (
    "it is multimodal and no row converts it as a whole; its text decoder would have to be saved "
    "as a checkpoint of its own first"
)
MIXTURE = "it is a mixture of experts already"
DRAFT = "it drafts tokens from the states of another Gemma 4 and works only beside that"
ALTUP = "it has several residual streams, inputs for every layer, and FFNs cut to their top neurons"

GROUPS: tuple[tuple[str, str], ...] = (
    (
        MIXTURE,
        "afmoe aria_text axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v32 deepseek_v4 dots3_note "
        "dots3_note_text exaone_moe flint glm4_moe_lite glm_moe_dsa gpt_oss hy_v4 inkling2_text "
        "inkling2_loop_text lara_mini sarvam_mla sarvam_moe "
        "inkling_text jamba jetmoe kimi_linear kolibri1 laguna llama4 llama4_text longcat_flash "
        "mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text olmoe qwen3_5_moe qwen3_next "
        "qwen4_exp qwen4_exp_text zaya",
    ),
    (
        MULTIMODAL,
        "qwen2_vl qwen2_5_vl llava llava_next llava_onevision cohere2_vision aya_vision paligemma "
        "idefics3 smolvlm emu3 got_ocr2 moss_transcribe_diarize phi4_multimodal",
    ),
    (
        f"{UNGATED} and has biases, as BERT's",
        "bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert "
        "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    ),
    (
        f"it is the decoder of an encoder-decoder model, and {UNGATED}",
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody "
        "mvp pegasus plbart prophetnet trocr whisper",
    ),
    (
        "its layers are one state-space mixer each, without an FFN",
        "mamba mamba2 falcon_mamba",
    ),
    (
        "its Mamba layers share transformer blocks between them, and only those have FFNs",
        "zamba zamba2",
    ),
    (DRAFT, "gemma4_assistant gemma4_unified_assistant"),
    (ALTUP, "gemma3n gemma3n_text"),
    (
        "its decoder is Gemma 4's without the switch for experts, and gemma4_text is not proved "
        "to hold it",
        "gemma4_unified gemma4_unified_text",
    ),
    (f"{UNGATED} and has biases, and its positions are learned", "biogpt openai-gpt gpt_neo"),
    (f"{UNGATED} and has biases, and its positions are sinusoids", "ctrl xglm"),
    (f"{UNGATED} and has biases, and runs in parallel with the attention", "gptj codegen"),
)
"""A reason, and the model types that share it."""

ALONE: dict[str, str] = {
    "falcon": f"{UNGATED}, and it may have biases or ALiBi positions",
    "mpt": f"{UNGATED}, and its positions are ALiBi",
    "bloom": f"{UNGATED} and has biases, and its positions are ALiBi",
    "gpt_bigcode": f"{UNGATED} and has biases, and its positions are learned",
    "gpt-sw3": f"it is a GPT-2 under another name, and {UNGATED}",
    "gpt_neox_japanese": f"{UNGATED}, and its rope turns part of each head behind LayerNorms",
    "persimmon": f"{UNGATED} and has biases",
    "fuyu": f"it is multimodal around a Persimmon, and {UNGATED}",
    "jais2": f"{UNGATED} and has biases, also those of its down projection",
    "nanochat": f"{UNGATED}, and its norms, those of queries and keys too, have no weights",
    "xlm": f"{UNGATED} and has biases, and its norms come after the residual sums",
    "xlnet": f"{UNGATED} and has biases, and its attention is over relative positions",
    "reformer": f"{UNGATED}, and its attention is over hashes, in reversible layers",
    "apertus": f"{UNGATED}, and its activation xIELU has parameters of its own",
    "apertus1p5_text": f"{UNGATED}, and its activation xIELU may have parameters of its own",
    "dory": "a norm stands between its FFN's product and down, and no expert has one there",
    "exaone": "it is a Llama with tensors of other names, and no row reads those",
    "bitnet": "its FFN norms its neurons before the down projection",
    "gemma3": "its image tokens see each other both ways, through masks by the type of layer, and "
    "no architecture that holds its text decoder is proved inside it",
    "glm4v": "its text decoder normalises the output of attention and FFN too, as GLM-4-0414 does, "
    "and glm4v_moe has no such norms",
    "glm46v": "its text decoder is that of glm4v, which no stock MoE architecture holds",
    "bamba": "its attention turns half of each head, and granitemoehybrid, which has its Mamba "
    "layers, turns all of it",
    "blt": "it reads bytes in patches, through three transformers one inside the other",
    "cohere_compass_text": "it has a rope for each type of layer, or none, and cohere2_moe, the "
    "nearest, one for its layers with a window",
    "cpmant": "its attention adds a learned bias for relative positions and segments",
    "diffllama": "its attention is the difference of two softmaxes",
    "doge": "its attention masks itself by learned scores, and its residuals have weights",
    "falcon_h1": "every layer runs attention and a Mamba mixer side by side",
    "hrm_text": "it runs two stacks of layers in turns, several times for each token",
    "lfm3": "lfm2_moe, which has its short convolutions, has no place for its windows, attention "
    "gates and norms of the outputs",
    "minicpm3": "it scales its residual branches, which no architecture with latent attention and "
    "experts does",
    "mllama": "some of its layers attend to an image, and no MoE architecture has such layers",
    "modernbert-decoder": "its first layer has no norm before the attention",
    "moshi": "it writes audio codebooks through a second decoder",
    "nemotron_h": "its FFNs are layers of their own between Mamba and attention, and no row maps "
    "them to its own layers of experts",
    "olmo_hybrid": "it norms inputs in linear-attention layers and outputs in the others, and no "
    "MoE architecture does both",
    "recurrent_gemma": "it mixes tokens with a gated linear recurrence, and its FFN has biases",
    "rwkv": "it mixes each token with the one before, inside its FFN too",
    "vaultgemma": "it caps its attention scores",
    "xlstm": "its layers are xLSTM cells",
}
"""The reason of model types that have one to themselves."""

TARGET_TYPES = frozenset({
    "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "solar_open", "hy_v3",
    "qwen3_5_moe_text", "lfm2_moe", "deepseek_v3", "granitemoe", "granitemoeshared",
    "granitemoe_swa", "flex_olmo", "dbrx", "beam", "mellum", "ernie4_5_moe", "cohere2_moe",
    "hunyuan_v1_moe", "phimoe",
})  # fmt: skip
"""What this package makes: targets, and no sources."""


def _grouped(groups: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    for reason, names in groups:
        yield from ((name, reason) for name in names.split())


REFUSED: Mapping[str, str] = {**dict(_grouped(GROUPS)), **ALONE}
"""The reason by model type, as the end of a sentence."""


def refused_reason(model_type: str) -> str:
    """Return why a model type is refused, to follow a sentence; empty if nothing is known."""
    reason = MIXTURE if model_type in TARGET_TYPES else REFUSED.get(model_type)
    return f": {reason}" if reason else ""
