"""What goes wrong on the Hub, as one sentence and the command that goes on afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from moe_convert.checkpoint.ranged import network_errors
from moe_convert.errors import HubError, MoeConvertError, scrubbed

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TRANSIENT = (408, 500, 502, 503, 504)
QUOTA_WORDS = ("storage limit", "quota", "payment", "upgrade your plan")
LONGEST_MESSAGE = 200
ATTEMPTS = 4
WAIT_S = 1.0
"""Before the second attempt; then twice as long each time."""

Result = TypeVar("Result")


def hub_failures() -> tuple[type[Exception], ...]:
    """Return what the client library raises: of the network, of the Hub, and of its own."""
    return (*network_errors(), RuntimeError, ValueError)


@dataclass
class Attempt:
    """What is being done, for the sentences: with which repository, and how to go on."""

    repo_id: str
    resume: str
    secrets: tuple[str | None, ...] = ()

    def told(self, error: BaseException) -> HubError:
        """Return what a user should read."""
        sentence, remedy = self._sentence(error)
        hint = f"{remedy} Then: {self.resume}" if remedy else f"Go on with: {self.resume}"
        return HubError(scrubbed(sentence, *self.secrets), scrubbed(hint, *self.secrets))

    def answered(self, error: BaseException) -> bool:
        """Whether the Hub said something, so that the network is not at fault."""
        answer = http_error(error)
        return answer is not None and answer.response.status_code not in TRANSIENT

    def _sentence(self, error: BaseException) -> tuple[str, str]:
        from huggingface_hub import constants
        from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

        answer = http_error(error)
        if answer is not None:
            return self._refusal(answer)
        causes = list(_causes(error))
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
            return "The Hub is not asked while HF_HUB_OFFLINE is set.", "Unset it."
        if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes):
            return "There is no Hub token here.", "Run `hf auth login` or set HF_TOKEN."
        if isinstance(error, OSError) and error.filename:
            return f"{error.filename} cannot be read: {error.strerror}.", ""
        if isinstance(error, json.JSONDecodeError):
            return "The Hub answers something that is no JSON.", ""
        if isinstance(error, ValueError):
            return f"The Hub refuses the upload: {_one_line(error)}.", "Correct it."
        if isinstance(error, network_errors()):
            return f"The Hub cannot be reached at {constants.ENDPOINT}; nothing was lost.", ""
        return f"The upload to {self.repo_id} broke off: {_one_line(causes[-1])}.", ""

    def _refusal(self, answer: HfHubHTTPError) -> tuple[str, str]:
        """Return sentence and remedy for an answer that says no."""
        status, said = answer.response.status_code, _one_line(answer.server_message or "")
        namespace = self.repo_id.partition("/")[0]
        if status == 401:
            return "The Hub does not accept the token.", "Run `hf auth login` or set HF_TOKEN."
        if status in {402, 413} or any(word in said.lower() for word in QUOTA_WORDS):
            return (
                f"The Hub takes no more for {self.repo_id} ({status}: {said}).",
                "Free some space there, or raise the limit.",
            )
        if status == 403:
            return (
                f"The token may not write to {self.repo_id} ({said}).",
                f"Use one with write access to {namespace}.",
            )
        if status == 404:
            return f"The Hub does not find {self.repo_id}, or not that revision of it.", ""
        if status == 429:
            return "The Hub answers no more for now: too many requests.", "Wait some minutes."
        if status in {409, 412}:
            return f"{self.repo_id} was changed by somebody else meanwhile.", ""
        if status >= 500:
            return f"The Hub fails with status {status}, several times in a row.", ""
        return f"The Hub refuses with status {status}: {said}.", ""


def http_error(error: BaseException) -> HfHubHTTPError | None:
    """Return the Hub's answer at the bottom of an error, if there is one."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _one_line(found: object) -> str:
    text = " ".join(str(found).split()).rstrip(".")
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "…"


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the network, or a server that fails."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    answer = http_error(error)
    if answer is not None:
        return answer.response.status_code in TRANSIENT
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    kinds = (*network_errors(), json.JSONDecodeError, RuntimeError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


@contextmanager
def explained(attempt: Attempt) -> Iterator[None]:
    """Turn what the client library raises into one sentence, without what it was raised from.

    Raises:
        HubError: always where something failed.
    """
    try:
        yield
    except MoeConvertError:
        raise
    except hub_failures() as error:
        raise attempt.told(error) from None


def patiently(action: Callable[[], Result]) -> Result:
    """Return what an action returns; it is repeated where the network or the server fails."""
    for number in range(ATTEMPTS - 1):
        try:
            return action()
        except hub_failures() as error:
            if not is_transient(error):
                raise
            time.sleep(WAIT_S * 2**number)
    return action()
