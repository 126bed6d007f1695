"""Working on long texts until each has its end: spoken, joined into one file, billed, cleared away."""

import asyncio
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, BinaryIO, ClassVar
from weakref import WeakValueDictionary

import structlog
from anyio import CancelScope, to_thread

from app.audio import CONTENT_TYPES
from app.bell import Bell
from app.catalog import find_voice
from app.completion import end_by_cancelling, run_to_end
from app.dashscope import SpeechParameters
from app.errors import AppError, ObjectNotFound, StorageError, UpstreamError
from app.jobs import Claimed, Rounds, again_in
from app.joining import Joiner
from app.models import LongText
from app.services.admission import read_description
from app.services.calls import OpenRecord, Status, reopened
from app.services.captions import CaptionFormat, write_captions
from app.services.narration import Ending, Narration, Tools
from app.services.segments import ClaimedText, ClaimLost
from app.services.spool import Spool
from app.settings import Settings
from app.storage import work_key

log = structlog.get_logger(__name__)

# A text whose processes died so often in a row without a new segment is given up: each death may have cost money.
DEATHS_BELIEVED = 20
# How long a text may wait for a store that is away, or for whatever else keeps it from its end.
KEPT = timedelta(days=7)
JOINING_TRIES = 40
CLEARING_SECONDS = 30.0
SUBTITLE_TYPES: dict[CaptionFormat, str] = {"srt": "application/x-subrip", "vtt": "text/vtt"}
_STATUSES: dict[Ending, Status] = {"spoken": "succeeded", "cancelled": "cancelled", "failed": "failed"}


class Narrator(Rounds[LongText]):
    """Takes on texts that are due, as many as there is room for, and goes on with those whose process died."""

    at_once: ClassVar[int] = 8
    per_user: ClassVar[int] = 2

    def __init__(self, settings: Settings, tools: Tools) -> None:
        super().__init__(tools.texts, tools.in_flight)
        self._settings = settings
        self._tools = tools
        self._texts, self._storage = tools.texts, tools.storage
        self._narrations: dict[int, Narration] = {}
        self._bells: WeakValueDictionary[int, Bell] = WeakValueDictionary()
        self._texts.hear_progress(self._ring_here)

    def bell(self, record_id: int) -> Bell:
        """Rung whenever this process, or one that can be heard, gets on with a text, and at its end."""
        return self._bells.setdefault(record_id, Bell())

    async def cancel(self, record_id: int) -> None:
        """Have a text stopped, and wait until it has its end, if that is in our hands."""
        await self._texts.cancel(record_id)
        if narration := self._narrations.get(record_id):
            narration.cancel()
        await asyncio.wait([self.check(record_id)])

    async def _ask(self, claimed: ClaimedText) -> dict[str, Any]:
        if claimed.record.status == "running":
            if claimed.row.misses >= DEATHS_BELIEVED:
                await self._give_up(claimed, UpstreamError("合成多次中断，已放弃，已产生的费用照常计算"))
            elif not await self._narrate(claimed):
                return again_in(0)
        if not await self._clear(claimed):
            return again_in(CLEARING_SECONDS)
        return {}

    async def _narrate(self, claimed: ClaimedText) -> bool:
        """Speak and join, and end the record. False if the text is to be gone on with."""
        record_id = claimed.record.id
        asked = read_description(claimed.record.model_name, claimed.record.input_data)
        heard = replace(asked, format="pcm", word_timestamps=bool(claimed.row.subtitle_key) and _tells_words(asked))
        speakers = self._settings.long_text_parallelism
        narration = Narration(self._tools, claimed, heard, speakers, partial(self._ring, record_id))
        self._narrations[record_id] = narration
        joining = asyncio.create_task(self._join(narration, claimed.row.output_key, asked))
        joining.add_done_callback(lambda _: narration.leave())  # it ends before the speech only when it broke
        try:
            ending = await narration.speak()
            if ending == "left":
                if joining.done():
                    joining.result()
                return False
            duration_ms = await joining
            record = reopened(claimed)
            if duration_ms:
                record.output_key, record.duration_ms = claimed.row.output_key, duration_ms
                await self._subtitle(claimed, narration, asked.sample_rate)
            return await self._end(claimed, ending, narration.failure, record)
        except ClaimLost:
            log.warning("narration_taken_over", record_id=record_id)
            return False
        finally:
            del self._narrations[record_id]
            await end_by_cancelling(joining)
            narration.close()

    async def _join(self, narration: Narration, key: str, asked: SpeechParameters) -> int:
        """Make one file of the segments while they come, and store it. Gives its length in milliseconds, 0 for none.

        It holds the text from its start to the first hole. A store that is away with some of it is waited for; raises
        StorageError when there is no time for that.
        """
        pauses = 0
        while True:
            try:
                async with Spool() as whole:
                    duration_ms = await self._fill(narration, whole.file, asked)
                    if duration_ms:
                        await self._storage.keep(key, whole.file, content_type=CONTENT_TYPES[asked.format])
                return duration_ms
            except (StorageError, ObjectNotFound, OSError) as error:
                log.warning("joining_failed", key=key, error=type(error).__name__)
                pauses += 1
                if narration.is_broken_off or pauses > JOINING_TRIES:
                    raise StorageError("音频拼接失败，稍后会重试") from error
                await narration.pause(pauses)

    async def _fill(self, narration: Narration, target: BinaryIO, asked: SpeechParameters) -> int:
        """Join what comes. No thread may still be at it when it is cancelled and the file closed."""
        with closing(Joiner(target, asked.format, asked.sample_rate, self._settings.long_text_bit_rate)) as joiner:
            number = 0
            while segment := await narration.segment(number):
                async with self._storage.open(segment.key) as chunks:
                    async for chunk in chunks:
                        await run_to_end(to_thread.run_sync(joiner.add, chunk))
                narration.note_joined(number)
                number += 1
            if rest := narration.rests.get(number):
                await run_to_end(to_thread.run_sync(lambda: joiner.add(rest.read())))
            if narration.ending == "left" or not joiner.samples_joined:
                return 0
            return await run_to_end(to_thread.run_sync(joiner.finish))

    async def _subtitle(self, claimed: ClaimedText, narration: Narration, sample_rate: int) -> None:
        key = claimed.row.subtitle_key
        if key is None:
            return
        segments: list[tuple[str | None, int]] = []
        while (number := len(segments)) in narration.done:
            cues = await self._texts.cues(claimed.record.id, number)
            segments.append((cues, narration.done[number].samples))
        format: CaptionFormat = "vtt" if key.endswith(".vtt") else "srt"
        subtitle = await to_thread.run_sync(write_captions, segments, sample_rate, format)
        async with Spool() as spool:
            await spool.write(subtitle.encode())
            await self._storage.keep(key, spool.file, content_type=SUBTITLE_TYPES[format])

    async def _end(self, claimed: ClaimedText, ending: Ending, failure: AppError | None, record: OpenRecord) -> bool:
        ended = await self._texts.end(claimed, _STATUSES[ending], failure if ending == "failed" else None, record)
        self._ring(record.id)
        return ended

    async def _clear(self, claimed: ClaimedText) -> bool:
        """Remove what was stored on the way. False if a store that is away keeps some of it: it is tried again then."""
        are_gone = True
        keys = [work_key(claimed.record.id, number) for number in range(claimed.row.segments_total)]
        for key in keys:
            try:
                await self._storage.delete(key)
            except StorageError:
                are_gone = False  # what is held on this machine goes all the same
        if are_gone:
            # What another machine holds for a store that was away comes there yet.
            await self._texts.clear(claimed, keys if self._storage.fetchable else ())
        else:
            log.warning("text_not_cleared", record_id=claimed.record.id)
        return are_gone

    def _ring(self, record_id: int) -> None:
        self._ring_here(record_id)
        self._texts.tell_progress(record_id)

    def _ring_here(self, record_id: int) -> None:
        if bell := self._bells.get(record_id):
            bell.ring()

    def _stop(self, claimed: Claimed[LongText], scope: CancelScope) -> None:
        if narration := self._narrations.get(claimed.record.id):
            narration.stop()
        else:
            scope.cancel()

    def _is_hopeless(self, claimed: ClaimedText) -> bool:
        return claimed.record.status == "running" and claimed.age > KEPT

    async def _give_up(self, claimed: ClaimedText, failure: AppError) -> None:
        try:
            await self._texts.resume(claimed)  # what is still at stake is billed
        except ClaimLost:
            return
        await self._end(claimed, "failed", failure, reopened(claimed))


def _tells_words(parameters: SpeechParameters) -> bool:
    """Whether a voice can tell when it says each word: cloned ones can, others by their mark (PROTOCOL §1.4)."""
    voice = find_voice(parameters.voice)
    return voice is None or voice.features.timestamp
