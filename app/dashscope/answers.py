"""Reading what the provider answers, whatever shape it comes in (PROTOCOL §0.3, §0.4)."""

import json
import math
import re
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import structlog

from app.dashscope.failures import explain, heed, plain
from app.errors import AppError, InvalidApiKey, Throttled, UnclearAnswer
from app.timing import note
from app.transcripts import storable

log = structlog.get_logger(__name__)

_DATA = re.compile(rb"^data:(.*)", re.MULTILINE)
BEIJING = ZoneInfo("Asia/Shanghai")  # the zone of the provider's times, in every region (§3, §5.1)
YEARS = range(1970, 3000)  # what every zone can show
MAX_COUNT = 2_000_000  # tokens, or seconds of 16 tracks of 12 hours; what is larger is no count


def understand(status: int, content: bytes, retry_after: str | None = None) -> dict[str, Any]:
    """Read an answer, whatever frame it comes in: neither status nor content type tells success for sure (§0.4).

    Raises the AppError that a failure means; `retry_after` is the header of that name.
    """
    answer = _find_json(content)
    note(provider_request_id=plain(str(answer.get("request_id") or "")) or None)
    failed, code, message = _find_failure(answer)
    if status < 300 and answer and (not failed or answer.get("output")):
        return answer
    if not failed and read_object(answer.get("output")).get("task_status"):
        return answer  # an unknown task may come with any status (§5.3)
    log.warning(
        "provider_refused",
        status=status,
        provider_code=plain(code),
        provider_request_id=plain(str(answer.get("request_id") or "")),
    )
    error = _explain_failure(status, code, message)
    if isinstance(error, Throttled) and (answer.get("output") or answer.get("usage")):
        error = _unclear(status)  # who has worked did not refuse to
    raise heed(error, status, retry_after)


def read_text(value: object) -> str | None:
    """A text that is one and not empty, fit to be stored."""
    return storable(value) if isinstance(value, str) and value else None


def read_object(value: object) -> dict[str, Any]:
    """A JSON object; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


def read_first(items: object) -> dict[str, Any]:
    """The first of a list of objects; an empty one where there is none."""
    return read_object(items[0]) if isinstance(items, list) and items else {}


def count(value: object) -> int | None:
    """A count of the provider, rounded up; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return math.ceil(value)


def read_moment(value: object) -> datetime | None:
    """A time of the provider's, which names no zone; None for what is none."""
    try:
        moment = datetime.fromisoformat(value if isinstance(value, str) else "")
        return _bearable((moment if moment.tzinfo else moment.replace(tzinfo=BEIJING)).astimezone(UTC))
    except (ValueError, OverflowError):
        return None


def read_instant(value: object) -> datetime | None:
    """A time of the provider's in milliseconds since 1970 (§5.3), or as `read_moment` takes it; None for others."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return read_moment(value)
    try:
        return _bearable(datetime.fromtimestamp(value / 1000, UTC))
    except (ValueError, OverflowError, OSError):
        return None


def _bearable(moment: datetime) -> datetime | None:
    return moment if moment.year in YEARS else None


def _explain_failure(status: int, code: str, message: str) -> AppError:
    if code:
        return explain(code, message, status)
    if status == 401:
        return InvalidApiKey()
    return explain("Throttling", message) if status == 429 else _unclear(status)


def _unclear(status: int) -> UnclearAnswer:
    return UnclearAnswer(f"百炼平台返回了无法识别的响应（HTTP {status}），请稍后重试")


def _find_json(content: bytes) -> dict[str, Any]:
    """The JSON object of a body, or of the data lines of a server-sent event."""
    told = _DATA.findall(content.replace(b"\r", b"\n")) if b"data:" in content else ()
    for candidate in (content, b"\n".join(told)):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _find_failure(answer: dict[str, Any]) -> tuple[bool, str, str]:
    """Whether either envelope (§0.3) holds a failure, with its code and message."""
    enveloped = answer.get("error")
    failure = enveloped if isinstance(enveloped, dict) else answer
    code = str(failure.get("code") or "")
    return bool(enveloped or code), code, str(failure.get("message") or failure.get("msg") or "")
