"""Every error that a user can cause, each with the exit code of the command that meets it.

MoeConvertError             1   unexpected failure
├── UsageError              2   option or recipe invalid
├── SourceError             3   source missing, corrupt or unsafe
│   └── UnsupportedError    3   its architecture has no exact home
├── DoesNotFitError         4   memory or disk too small, nothing written
├── VerificationError       5   parity or a quality gate failed, output kept and marked
├── HubError                6   Hub, authentication or network
├── OutputExistsError       7   refusing to overwrite
├── MissingDependencyError  8   an optional package is not installed
└── InterruptedByUser     130   Ctrl-C
"""

from __future__ import annotations

import os
import re
from typing import ClassVar

TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TOKEN_PATTERN = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9.\-]{20,}|\bBearer\s+\S+")
SHORTEST_TOKEN = 8


def scrubbed(text: str, *secrets: str | None) -> str:
    """Return a text without these secrets, the environment's tokens and what looks like one."""
    known = (*secrets, *(os.environ.get(name) for name in TOKEN_NAMES))
    for secret in known:
        if secret and len(secret) >= SHORTEST_TOKEN:
            text = text.replace(secret, "***").replace(secret.strip(), "***")
    return TOKEN_PATTERN.sub("***", text)


class MoeConvertError(Exception):
    """Base class: one sentence in `message`, the remedy in `hint`; neither ever holds a token."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failure"

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = scrubbed(message), scrubbed(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UsageError(MoeConvertError):
    """An option or a recipe field is invalid."""

    exit_code = 2
    code = "usage"


class SourceError(MoeConvertError):
    """The source checkpoint is missing, corrupt or unsafe to read."""

    exit_code = 3
    code = "source"


class UnsupportedError(SourceError):
    """No stock Mixture-of-Experts architecture holds the source exactly."""

    code = "unsupported"


class DoesNotFitError(MoeConvertError):
    """The result does not fit on this machine."""

    exit_code = 4
    code = "does_not_fit"


class VerificationError(MoeConvertError):
    """The written checkpoint failed a check that should hold."""

    exit_code = 5
    code = "verification"


class HubError(MoeConvertError):
    """The Hugging Face Hub could not be reached or refused."""

    exit_code = 6
    code = "hub"


class OutputExistsError(MoeConvertError):
    """The output folder exists already."""

    exit_code = 7
    code = "output_exists"


class MissingDependencyError(MoeConvertError):
    """An optional package is needed and not installed."""

    exit_code = 8
    code = "missing_dependency"


class InterruptedByUser(MoeConvertError):
    """The user stopped the run; what was written is kept."""

    exit_code = 130
    code = "interrupted"


def unforeseen(error: Exception) -> MoeConvertError:
    """Return an error that nobody saw coming as one line."""
    return MoeConvertError(
        f"{type(error).__name__}: {' '.join(str(error).split())}",
        "This is a bug or an unforeseen input; MOE_CONVERT_DEBUG=1 shows where.",
    )
