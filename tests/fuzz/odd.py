"""Values, texts and bytes that nobody expects, by chance from a seed."""

import json
from random import Random
from typing import Any

CODES = (
    "", "InvalidApiKey", "ModelNotFound", "Model.AccessDenied", "InvalidParameter", "Throttling.RateQuota",
    "Throttling.AllocationQuota", "Arrearage", "DataInspectionFailed", "InternalError", "CLIENT_ERROR", "SystemError",
    "BadRequest.ResourceNotExist", "Audio.DecoderError", "AUDIO_DURATION_TOO_LONG", "RequestTimeOut", "☃", "x" * 300,
    "FILE_404_NOT_FOUND", "CANCELED", "SUCCESS_WITH_NO_VALID_FRAGMENT",
)  # fmt: skip
MESSAGES = (
    "", "[tts:]Engine return error code: 418", "Model not exist",
    "Requests rate limit exceeded, please try again later.",
    "voice limit", "request timeout after 23 seconds.", "您当前的配额为 1", "\x00\x01\x7f",
    "http://" * 20_000, "a" * 100_000,
    "Bearer sk-1234567890abcdef https://x.oss-cn-beijing.aliyuncs.com/a?Signature=b", "\ud800", "% {0} %s {name}",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e999, float("nan"),
    "", "0", "7", "\x00",
    "\ud800", "null", "x" * 5000, "SUCCEEDED", "RUNNING", "FAILED", "UNKNOWN", "2025-01-01 10:00:00.123",
    "0001-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "http://169.254.169.254/", "file:///etc/passwd", "../../x",
    "cosyvoice-v3-flash-mine-0123456789abcdef",
)  # fmt: skip
NAMES = (
    "header", "payload", "output", "usage", "characters", "seconds", "task_id", "task_status", "code", "message",
    "error",
    "request_id", "choices", "content", "text", "voice_id", "voice_list", "status", "result", "data",
)  # fmt: skip


def value(chance: Random, depth: int = 3) -> Any:
    """Any JSON value, with numbers that JSON has no word for."""
    kind = chance.random()
    if depth == 0 or kind < 0.6:
        return chance.choice(SCALARS)
    if kind < 0.8:
        return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    return {chance.choice(NAMES): value(chance, depth - 1) for _ in range(chance.randrange(4))}


def spoil(good: Any, chance: Random) -> Any:
    """The same value with something in it replaced, left out or put beside."""
    if isinstance(good, dict) and good and chance.random() < 0.85:
        name = chance.choice(list(good))
        if chance.random() < 0.15:
            return {other: each for other, each in good.items() if other != name}
        return {**good, name: spoil(good[name], chance)}
    if isinstance(good, list) and good and chance.random() < 0.7:
        place = chance.randrange(len(good))
        return [*good[:place], spoil(good[place], chance), *good[place + 1 :]]
    return value(chance)


def json_bytes(told: Any) -> bytes:
    """A JSON value on the wire, lone surrogates escaped."""
    return json.dumps(told).encode()


def document(chance: Random) -> bytes:
    """What comes where JSON is expected: some, none, or what costs a careless reader dearly."""
    return chance.choice(
        (
            lambda: json_bytes(value(chance)),
            lambda: b"",
            lambda: b"{",
            lambda: b"[]",
            lambda: b"null",
            lambda: b"\xef\xbb\xbf{}",
            lambda: chance.randbytes(chance.randrange(300)),
            lambda: b"[" * 100_000,
            lambda: b'{"header":' * 50_000,
            lambda: b'{"a":' + b"9" * 10_000 + b"}",
            lambda: b"<html>502 Bad Gateway</html>",
            lambda: b"data: {}\n\n" * 1000,
            lambda: b"\n" * 1_000_000,
        )
    )()
