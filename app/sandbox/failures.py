"""The ways a task or a connection can go wrong.

TaskFailed         the service says so with task-failed and closes the socket (PROTOCOL.md §1.7)
ConnectionBroken   the service is gone without a word: only a switched-on fault does that
InvalidFrame       what came is not a protocol message at all; the socket is closed with 1007 (§1.3)
"""

from __future__ import annotations

from typing import Final

INVALID_PARAMETER: Final = "InvalidParameter"
VOICE_REFUSED: Final = "[tts:]Engine return error code: 418"
INSTRUCTION_REFUSED: Final = "[tts:]Engine return error code: 428"
INPUT_MISSING: Final = "task can not be null"
TEXT_INVALID: Final = "Please ensure input text is valid."
VOICE_MISSING: Final = "Request voice is invalid!"
SSML_UNSUPPORTED: Final = "SSML text is not supported at the moment!"
ONE_TEXT_ONLY: Final = "Text request limit violated, expected 1."


class TaskFailed(Exception):
    """Ends a task with `task-failed`: a code of PROTOCOL.md §11 and its message (§1.10)."""

    def __init__(self, message: str, code: str = INVALID_PARAMETER) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class ConnectionBroken(Exception):
    """The socket is to be dropped in the middle of a task, without task-failed."""


class InvalidFrame(Exception):
    """A frame that is no JSON object."""


def missing_parameter(name: str) -> TaskFailed:
    """The failure for an absent or empty required field (§1.10), e.g. `payload.model`."""
    return TaskFailed(f"Missing required parameter '{name}'! Please follow the protocol!")


def invalid_parameter(name: str) -> TaskFailed:
    """The failure for a field with an impossible value (§11); which one the docs leave open (§14.6)."""
    return TaskFailed(f"Required parameter({name}) missing or invalid, please check the request parameters.")
