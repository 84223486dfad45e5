"""What transformers makes of a config.json: every default filled in, or the reason it is refused.

Importing its configuration classes imports torch and much of what runs models, seconds of work that
a plan has no use for. `aside` asks a process of its own, in which torch is hidden, and takes one.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from moe_convert.errors import SourceError

Filled = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Returns a config.json of a type that transformers knows with every default filled in."""

CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from moe_convert.checkpoint.configs import serve
serve()
"""


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the class of this model type makes of it.

    Raises:
        SourceError: the class takes no such values.
    """
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[str(values["model_type"])].from_dict(dict(values))
        result: dict[str, Any] = config.to_dict()
    except Exception as error:
        raise SourceError(f"transformers rejects this config.json: {_first_line(error)}") from error
    return result


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


@contextmanager
def aside(*, torch_follows: bool = False) -> Iterator[Filled]:
    """Yield what answers like `filled`: a process without torch, unless torch is imported here.

    With `torch_follows` it is imported here while that process starts.
    """
    if "torch" in sys.modules:
        yield filled
        return
    with apart() as fill:
        if torch_follows:
            threading.Thread(target=importlib.import_module, args=("torch",)).start()
        yield fill


@contextmanager
def apart() -> Iterator[Filled]:
    """Yield what answers like `filled`, out of a process of its own."""
    command = [sys.executable, "-I", "-c", CHILD, json.dumps(sys.path)]
    pipe, silence = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(  # noqa: S603 - this interpreter with the program above
        command, stdin=pipe, stdout=pipe, stderr=silence, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    to, back = child.stdin, child.stdout
    try:
        yield lambda values: _asked(values, to, back)
    finally:
        child.kill()
        with suppress(OSError):
            to.close()
        back.close()
        child.wait()


def _asked(values: Mapping[str, Any], to: IO[str], back: IO[str]) -> dict[str, Any]:
    """Return the answer to one question, found here if the other process has none."""
    try:
        to.write(json.dumps(dict(values)) + "\n")
        to.flush()
        answer = json.loads(back.readline())
    except (OSError, ValueError, TypeError):
        return filled(values)
    if "refused" in answer:
        raise SourceError(answer["refused"])
    result: dict[str, Any] = answer["filled"]
    return result


def serve() -> None:
    """Answer one config.json per line until there are no more."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = {"filled": filled(json.loads(line))}
        except SourceError as error:
            answer = {"refused": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
