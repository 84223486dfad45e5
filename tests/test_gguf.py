"""GGUF sources: every architecture that transformers dequantises and that has a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moe_convert.checkpoint.gguf import TAKEN_FROM_DEFAULTS
from moe_convert.errors import SourceError
from moe_convert.families import FAMILIES
from moe_convert.families.custom import CUSTOM_FAMILIES
from moe_convert.workflow import upcycle
from tests.tiny_gguf import FILES, dense_of, write_gguf
from tests.tools import converted, difference, logits, planned

if TYPE_CHECKING:
    import torch

FP32_TOLERANCE = 1e-4
BLOCKS = ("F16", "Q8_0", "Q4_0", "Q5_1")
NO_DENSE_ROW = {
    "falcon", "bloom", "t5", "umt5", "mamba", "deci", "mistral",
    "qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2", "qwen35moe",
}  # fmt: skip
"""MoE already, no decoder with a row, or (mistral) stored as llama."""

Files = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return the dense checkpoint of an architecture and a GGUF of it, each made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(arch: str, kind: str = "F32") -> tuple[Path, Path]:
        if (arch, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{kind}")
            dense = dense_of(arch, folder / "dense")
            made[arch, kind] = dense, write_gguf(arch, dense, folder / "tiny.gguf", kind=kind)
        return made[arch, kind]

    return make


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the copies that transformers makes of modelling files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


def target_of(arch: str) -> dict[str, Any]:
    stock = FILES[arch].model_type in FAMILIES
    return {} if stock else {"target__architecture": "custom"}


def loaded_logits(folder: Path, **options: Any) -> torch.Tensor:
    """Return what `tools.logits` does, for what needs options to be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = torch.randint(
        model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        return model(ids).logits.float()


def gguf_logits(path: Path) -> torch.Tensor:
    """Return the logits of the dense model that transformers reads from a GGUF."""
    from transformers import GgufConfig

    dequantised = GgufConfig(dequantize=True)
    return loaded_logits(path.parent, gguf_file=path.name, quantization_config=dequantised)


def test_every_architecture_that_transformers_reads_is_tried() -> None:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    assert known == set(FILES) | set(TAKEN_FROM_DEFAULTS) | NO_DENSE_ROW
    for tiny in FILES.values():
        assert tiny.model_type in {*FAMILIES, *CUSTOM_FAMILIES}


@pytest.mark.parametrize("arch", list(FILES))
def test_the_result_computes_what_the_file_was_made_from(
    files: Files, tmp_path: Path, arch: str
) -> None:
    dense, path = files(arch)
    manifest = upcycle(planned(path, tmp_path / "out", **target_of(arch)))
    assert manifest.verify is not None
    assert manifest.state == "verified", manifest.verify.failures
    assert manifest.verify.generation
    made = loaded_logits(tmp_path / "out", trust_remote_code=bool(target_of(arch)))
    assert difference(made, gguf_logits(path)) <= FP32_TOLERANCE
    assert difference(made, logits(dense)) <= FP32_TOLERANCE


@pytest.mark.parametrize("arch", list(TAKEN_FROM_DEFAULTS))
def test_what_would_be_filled_in_is_refused(tmp_path: Path, arch: str) -> None:
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(6)
    writer.add_embedding_length(64)
    writer.add_key_value(f"{arch}.attention.key_length_swa", 32, gguf.GGUFValueType.UINT32)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=f"Of a {arch} GGUF transformers does not read"):
        planned(path)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_dequantised_as_transformers_does(
    files: Files, tmp_path: Path, kind: str
) -> None:
    dense, path = files("llama", kind)
    converted(path, tmp_path / "out")
    made = logits(tmp_path / "out")
    assert difference(made, gguf_logits(path)) <= FP32_TOLERANCE
    assert difference(made, logits(dense)) > FP32_TOLERANCE


FREQUENCIES = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}


@pytest.mark.parametrize(
    ("arch", "metadata", "words"),
    [
        ("llama", {"tensors": FREQUENCIES}, "tensor rope_freqs.weight"),
        (
            "llama",
            {"tensors": {"blk.0.attn_q.bias": np.ones(128, dtype=np.float32)}},
            "tensor blk.0.attn_q.bias",
        ),
        ("llama", {"rope__scaling__type": "yarn"}, "rope.scaling.type=yarn"),
        ("llama", {"attention__sliding_window": 512}, "sliding_window=512"),
        ("llama", {"expert_count": 8}, "expert_count=8"),
        ("phi3", {"attention__sliding_window": 512}, "sliding_window=512"),
        ("phi3", {"rope__dimension_count": 8}, "rope.dimension_count=8"),
        ("stablelm", {"rope__freq_base": 500000.0}, "rope.freq_base=500000"),
        ("nemotron", {"attention__layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
        ("gemma2", {"final_logit_softcapping": 7.0}, "final_logit_softcapping=7"),
        ("qwen3", {"attention__key_length": 64}, "key_length=64"),
    ],
)
def test_what_transformers_does_not_read_is_refused(
    files: Files, tmp_path: Path, arch: str, metadata: dict[str, Any], words: str
) -> None:
    dense, _ = files(arch)
    path = write_gguf(arch, dense, tmp_path / "tiny.gguf", **metadata)
    with pytest.raises(SourceError, match=words):
        planned(path, **target_of(arch))


def test_a_window_of_none_and_an_unscaled_rope_are_no_difference(
    files: Files, tmp_path: Path
) -> None:
    """llama.cpp writes a window of 0 for Phi-4, and `none` for a rope without scaling."""
    dense, _ = files("phi3")
    path = write_gguf(
        "phi3",
        dense,
        tmp_path / "tiny.gguf",
        attention__sliding_window=0,
        rope__scaling__type="none",
    )
    assert planned(path).target.model_type == "mixtral"


def test_a_file_without_one_of_its_tensors_is_refused(files: Files, tmp_path: Path) -> None:
    """Cut off one layer: the metadata promises what the file does not hold."""
    dense, _ = files("qwen2")
    path = write_gguf("qwen2", dense, tmp_path / "tiny.gguf", block_count=4)
    with pytest.raises(SourceError, match=r"tiny\.gguf .* do not agree on model\.layers\.3"):
        converted(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
