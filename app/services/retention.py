"""What is kept for some days only: what was said and written, and its audio. What it cost is kept for good."""

import asyncio
import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import structlog
from anyio import to_thread
from sqlalchemy import ColumnElement, Select, delete, exists, select, update

from app.database import UNAVAILABLE, Database, once_more
from app.models import Enrollment, LongText, Record, Segment, SubmittedFile, Transcription
from app.services.removals import Remover, keys_of, remove_later

log = structlog.get_logger(__name__)

ERASED_AT_ONCE = 50
# Others want to write as well.
PAUSE_SECONDS = 0.2
ROUND_SECONDS = 3600.0
FAILED_ROUND_SECONDS = 60.0
# How a call was made, without anything that its user wrote.
KEPT_PARAMETERS = frozenset(
    ("voice", "format", "sample_rate", "volume", "speech_rate", "pitch_rate", "audio_format", "bytes", "enable_itn",
     "enable_words", "channel_id")
)  # fmt: skip


class Retention:
    """Erases what was said in records that have ended more than `days` ago; without days, nothing."""

    def __init__(self, database: Database, remover: Remover, days: int | None) -> None:
        self._database = database
        self._remover = remover
        self._days = days

    async def run(self) -> None:
        """Until cancelled: erase what is due, once an hour. It ends by itself where all is kept."""
        if self._days is None:
            return
        while True:
            seconds = ROUND_SECONDS
            try:
                if await self.erase_some():
                    self._remover.wake()
                    seconds = PAUSE_SECONDS
            except Exception as error:
                # Whatever it was, the next round must come.
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning("records_not_erased", error=type(error).__name__, exc_info=unexpected)
                seconds = FAILED_ROUND_SECONDS
            await asyncio.sleep(random.uniform(seconds / 2, seconds))  # noqa: S311 - parts several processes

    @once_more
    async def erase_some(self) -> int:
        """Erase some records that are due and that no other process erases now. Gives their number."""
        if self._days is None:
            return 0
        now = datetime.now(UTC)
        async with self._database.transaction() as session:
            found = [(id, asked) for id, asked in await session.execute(due(now - timedelta(days=self._days)))]
            if not found:
                return 0
            ids = [id for id, _ in found]
            remove_later(session, await keys_of(session, ids))
            erased = await to_thread.run_sync(lambda: [_erased(id, asked, now) for id, asked in found])
            await session.execute(update(Record), erased)
            await session.execute(update(LongText).where(LongText.record_id.in_(ids)).values(subtitle_key=None))
            await session.execute(delete(Segment).where(Segment.record_id.in_(ids)))
            heard = update(Transcription).where(Transcription.record_id.in_(ids))
            nothing = {"transcripts": None, "transcripts_with_words": None, "audio_info": None, "result_url": None}
            await session.execute(heard.values(**nothing))
            made = update(Enrollment).where(Enrollment.record_id.in_(ids))
            await session.execute(made.values(digest="", voices_before="null"))
        log.info("records_erased", records=len(ids))
        return len(ids)


def due(ended_before: datetime) -> Select[int, str]:
    """The records to erase next, with their input: those that have ended, and of which nothing is looked after."""
    return (
        select(Record.id, Record.input_data)
        .where(
            Record.erased_at.is_(None),
            Record.finished_at < ended_before,
            Record.status != "running",
            ~_is_open(SubmittedFile),
            ~_is_open(Transcription),
            ~_is_open(LongText),
            ~(_is_open(Enrollment, Enrollment.voice_id.is_(None))),
        )
        .order_by(Record.finished_at)
        .limit(ERASED_AT_ONCE)
        .with_for_update(of=Record, skip_locked=True)
    )


def _is_open(
    table: type[SubmittedFile | Transcription | LongText | Enrollment], *more: ColumnElement[bool]
) -> ColumnElement[bool]:
    return exists().where(table.record_id == Record.id, table.next_check_at.is_not(None), *more)


def _erased(record_id: int, input_data: str, now: datetime) -> dict[str, Any]:
    """A record that tells how it was done, and no more."""
    return {
        "id": record_id,
        "input_data": parameters_of(input_data),
        "output_key": None,
        "planned_key": None,
        "output_text": None,
        "output_data": None,
        "error_message": None,
        "idempotency_key": None,
        "request_digest": None,
        "erased_at": now,
    }


def parameters_of(input_data: str) -> str:
    """What was asked, without what was written: JSON of the parameters that are known to tell nothing."""
    try:
        asked = orjson.loads(input_data)
    except orjson.JSONDecodeError:
        asked = None
    kept = {name: value for name, value in asked.items() if name in KEPT_PARAMETERS} if isinstance(asked, dict) else {}
    return json.dumps(kept, ensure_ascii=False)
