"""Speaking one long text: segment by segment, several at once.

A narration lasts as long as one process works on a text. It goes on from the checkpoints of the one before it, and
leaves its own to the next.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count, takewhile
from typing import Literal, NamedTuple

import structlog
from anyio import to_thread

from app.audio import PCM_FRAME_BYTES
from app.bell import Bell
from app.catalog import count_characters
from app.completion import end_by_cancelling, run_to_end
from app.computation import compute
from app.dashscope import Interruption, SpeechClient, SpeechParameters, Timeline, Usage, may_pass
from app.database import UNAVAILABLE
from app.errors import Abandoned, AppError, NotReady, StorageError, StorageFull, UnclearAnswer
from app.inflight import InFlight
from app.joining import samples_to_ms
from app.models import Segment
from app.services.accounts import AccountService
from app.services.captions import lay_out, time_sentences
from app.services.segments import ClaimedText, ClaimLost, OpenTexts, SpeechStopped, SpokenSegment
from app.services.spool import Spool
from app.splitting import is_silent
from app.storage import Storage, work_key

log = structlog.get_logger(__name__)

# How often a segment is bought at most, when the provider breaks off in the middle of it.
TRIES = 3
# How long a provider that takes nothing is waited for while no other segment makes progress either.
PATIENCE_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 15.0
SETTLEMENT_TRIES = 16
LONGEST_SETTLEMENT_PAUSE_SECONDS = 4.0  # as often as the claim is renewed: it must not run out first
WATCH_SECONDS = 1.0
SAMPLES_TYPE = "audio/pcm"
# How far ahead of the joined file the speech may be: in segments for each one that is spoken at once, and in audio that
# only waits to be joined. Towards the end that is little, so that the file is ready soon after the last segment.
SEGMENTS_AHEAD_PER_SPEAKER = 3
AUDIO_AHEAD_SECONDS = 600
AUDIO_AHEAD_AT_THE_END_SECONDS = 60

Ending = Literal["spoken", "cancelled", "failed", "left"]


class Tools(NamedTuple):
    """What a narration works with."""

    texts: OpenTexts
    accounts: AccountService
    speech: SpeechClient
    storage: Storage
    in_flight: InFlight


class Narration:
    """One run over the segments of a text. `done` grows; whoever joins them waits for the next by `segment()`."""

    def __init__(
        self,
        tools: Tools,
        claimed: ClaimedText,
        parameters: SpeechParameters,
        speakers: int,
        on_progress: Callable[[], object],
    ) -> None:
        self._texts, self._accounts, self._speech, self._storage, self._in_flight = tools
        self._claimed = claimed
        self._record_id = claimed.record.id
        self._parameters = parameters
        self._speakers = speakers
        self._on_progress = on_progress
        self._bell = Bell()
        self._beginning = asyncio.Lock()
        self._waiting: deque[int] = deque()
        self._under_way: dict[int, Interruption] = {}
        self._failed_at = 0
        self._joined = 0
        self._progress_at = 0.0
        self._cancelled = False
        self._leaving = False
        self.is_broken_off = False
        self.ending: Ending | None = None
        self.total = 0
        self.done: dict[int, SpokenSegment] = {}
        self.failure: AppError | None = None
        self.rests: dict[int, Spool] = {}
        """What was spoken of segments that were broken off for good."""

    async def speak(self) -> Ending:
        """Speak what is not spoken yet. Gives how it ended: `left` to be gone on with, here or elsewhere.

        Raises ClaimLost when somebody else works on the text.
        """
        await self._resume()
        watching = asyncio.create_task(self._watch())
        speakers = [asyncio.create_task(self._speak_segments()) for _ in range(self._speakers)]
        for speaker in speakers:
            speaker.add_done_callback(self._leave_if_broken)
        try:
            await asyncio.wait(speakers)  # what one breaks on, the others do not suffer for: they have paid
            for speaker in speakers:
                speaker.result()
        finally:
            for task in (watching, *speakers):
                await end_by_cancelling(task)
            if len(self.done) == self.total:
                self.ending = "spoken"
            else:
                self.ending = "cancelled" if self._cancelled else "failed" if self.failure else "left"
            self._bell.ring()
        return self.ending

    def cancel(self) -> None:
        """Stop speaking for good: the user wants no more."""
        self._cancelled = True
        self._break_off()

    def leave(self) -> None:
        """Begin nothing more: this process is about to end."""
        self._leaving = True
        self._bell.ring()

    def stop(self) -> None:
        """Break off what is under way as well: it is counted, and bought again by whoever goes on."""
        self._leaving = True
        self._break_off()

    async def segment(self, number: int) -> SpokenSegment | None:
        """Wait for a segment; None when it will not come any more."""
        await self._bell.until(lambda: number in self.done or self.ending is not None)
        return self.done.get(number)

    def note_joined(self, number: int) -> None:
        """Let the speakers go on: a segment lies about no more."""
        self._joined = max(self._joined, number + 1)
        self._bell.ring()

    def close(self) -> None:
        """Let go of what was broken off."""
        for spool in self.rests.values():
            spool.file.close()

    async def _resume(self) -> None:
        segments = await self._texts.resume(self._claimed)
        self.total = len(segments)
        self.done = {each.number: spoken for each in segments if (spoken := _checkpoint(each))}
        self._waiting.extend(each.number for each in segments if each.number not in self.done)
        self._cancelled = await self._texts.is_cancelled(self._record_id)
        self._bell.ring()
        self._progress_at = asyncio.get_running_loop().time()

    def _leave_if_broken(self, speaker: "asyncio.Task[None]") -> None:
        if not speaker.cancelled() and speaker.exception() is not None:
            self.leave()

    async def _watch(self) -> None:
        """Hear of the end of this process, and of a user who stopped the speech by another one."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._in_flight.hurried:
                self.leave()
            with suppress(*UNAVAILABLE):
                if await self._texts.is_cancelled(self._record_id):
                    self.cancel()
                    return

    @property
    def _is_stopped(self) -> bool:
        return self._cancelled or self._leaving or self.failure is not None

    def _break_off(self) -> None:
        self.is_broken_off = True
        for interruption in self._under_way.values():
            interruption.request()
        self._bell.ring()

    async def _speak_segments(self) -> None:
        while True:
            with await self._turn() as turn:
                await self._bell.until(lambda: self._is_stopped or not self._waiting or self._is_room())
                if self._is_stopped or not self._waiting:
                    return
                await self._speak_segment(self._waiting.popleft(), turn)

    async def _turn(self) -> ExitStack:
        """Wait for the turn to begin a segment, so that the provider gets them in order; it is ended by `close`."""
        await self._beginning.acquire()
        turn = ExitStack()
        turn.callback(self._beginning.release)
        return turn

    def _is_room(self) -> bool:
        """Whether the joined file is near enough for another segment."""
        number = self._waiting[0]
        if number >= self._joined + SEGMENTS_AHEAD_PER_SPEAKER * self._speakers:
            return False
        unjoined = takewhile(lambda each: each is not None, map(self.done.get, count(self._joined)))
        samples = sum(segment.samples for segment in unjoined if segment)
        is_near_end = number >= self.total - 2 * self._speakers
        seconds = AUDIO_AHEAD_AT_THE_END_SECONDS if is_near_end else AUDIO_AHEAD_SECONDS
        return samples <= seconds * self._parameters.sample_rate

    async def _speak_segment(self, number: int, turn: ExitStack) -> None:
        """Have a segment spoken, again if need be, and keep it. The turn ends once its text is on its way."""
        tries = pauses = 0
        while not self._is_useless(number):
            if not self._can_be_kept():
                pauses += 1
                await self.pause(pauses)
                continue
            with ExitStack() as passing:
                spool = Spool()
                passing.callback(spool.file.close)
                failure, was_bought = await self._try(number, spool, turn)
                turn.close()
                if failure is not None and self._is_useless(number):
                    self.rests[number] = spool
                    passing.pop_all()
                    return
            if failure is None:
                return
            tries += was_bought
            passes = may_pass(failure) or isinstance(failure, NotReady)
            if not passes or tries == TRIES or (not was_bought and self._is_out_of_patience()):
                self._give_up(number, failure)
                return
            pauses += 1
            log.info("segment_retried", record_id=self._record_id, number=number, error=type(failure).__name__)
            await self.pause(pauses)

    def _can_be_kept(self) -> bool:
        """Whether what is bought now can be kept. To wait for that is nobody's failure, however long it takes."""
        try:
            self._storage.require_room()
        except StorageFull:
            self._progress_at = asyncio.get_running_loop().time()
            return False
        return True

    def _is_useless(self, number: int) -> bool:
        """Whether it is of no use to buy a segment now; one before the segment that failed still is."""
        return self._cancelled or self._leaving or (self.failure is not None and number > self._failed_at)

    async def _try(self, number: int, spool: Spool, turn: ExitStack) -> tuple[AppError | None, bool]:
        """Buy a segment once. Gives what kept it from being spoken and kept, and whether it was paid for."""
        attempt, usage, interruption, timeline = uuid.uuid4(), Usage(), Interruption(), Timeline()
        spoken: SpokenSegment | None = None
        was_bought = False
        text = ""

        async def stake() -> None:
            nonlocal was_bought
            characters = count_characters(text, ssml=self._parameters.enable_ssml)
            await self._texts.stake(self._claimed, number, attempt, characters)
            was_bought = True
            turn.close()

        self._under_way[number] = interruption
        try:
            text = await self._texts.text(self._record_id, number)
            if self.total > 1 and is_silent(text):  # the provider may refuse it (PROTOCOL §1.10)
                await self._texts.stake(self._claimed, number, attempt, 0)
                was_bought = True
                spoken = await self._store(number, spool, timeline, text)
                return None, False
            credential = await self._accounts.credential(self._claimed.row.user_id)
            async with self._speech.speak(
                credential, self._parameters, text, usage, stake, interruption, timeline
            ) as task:
                async for chunk in task.audio():
                    await spool.write(chunk)
            if task.cancelled:
                return Abandoned(), was_bought
            if not spool.size:
                return UnclearAnswer("百炼平台没有返回音频，请稍后重试"), was_bought
            spoken = await self._store(number, spool, timeline, text)
        except AppError as error:
            return error, was_bought
        except SpeechStopped:
            self.cancel()
            return Abandoned(), was_bought
        except UNAVAILABLE as error:
            log.warning("segment_delayed", record_id=self._record_id, number=number, error=type(error).__name__)
            return NotReady(), was_bought
        finally:
            del self._under_way[number]
            if was_bought:
                await run_to_end(self._settle(number, attempt, usage.characters, spoken))
        return None, was_bought

    async def _store(self, number: int, spool: Spool, timeline: Timeline, text: str) -> SpokenSegment:
        """Put the samples where they are found again, as soon as the store or this machine's disk takes them.

        Raises StorageError only when there is no time to wait for that.
        """
        key = work_key(self._record_id, number)
        pauses = 0
        while True:
            try:
                await self._storage.keep(key, spool.file, content_type=SAMPLES_TYPE)
                break
            except StorageError:
                pauses += 1
                if self.is_broken_off:
                    raise
                await self.pause(pauses)
        samples = spool.size // PCM_FRAME_BYTES
        if not self._claimed.row.subtitle_key:
            return SpokenSegment(key, samples)
        plain, sample_rate = "" if self._parameters.enable_ssml else text, self._parameters.sample_rate
        sentences = await to_thread.run_sync(time_sentences, timeline, plain, samples, sample_rate)
        cues = await compute(len(sentences), lay_out, sentences, samples_to_ms(samples, sample_rate))
        return SpokenSegment(key, samples, cues)

    async def _settle(self, number: int, attempt: uuid.UUID, characters: int, spoken: SpokenSegment | None) -> None:
        """Write down what a try was counted and what it brought; a database that is away is waited for.

        Raises ClaimLost if somebody else counted it as a guess meanwhile.
        """
        for pauses in range(SETTLEMENT_TRIES):
            try:
                is_mine = await self._texts.settle(self._record_id, number, attempt, characters, spoken)
                break
            except UNAVAILABLE as error:
                # Should it not come back, this line holds the true count.
                log.warning(
                    "segment_settlement_delayed",
                    record_id=self._record_id,
                    number=number,
                    characters=characters,
                    error=type(error).__name__,
                )
                await asyncio.sleep(min(0.5 * 2**pauses, LONGEST_SETTLEMENT_PAUSE_SECONDS))
        else:
            is_mine = await self._texts.settle(self._record_id, number, attempt, characters, spoken)
        if not is_mine:
            log.warning("segment_settled_by_others", record_id=self._record_id, number=number, characters=characters)
            raise ClaimLost
        if spoken is not None:
            self.done[number] = replace(spoken, cues=None)
            self._progress_at = asyncio.get_running_loop().time()
            self._bell.ring()
        self._on_progress()

    def _give_up(self, number: int, failure: AppError) -> None:
        """Fail the text: nothing after this segment is of use; what comes before it goes on to its end."""
        log.warning("segment_failed", record_id=self._record_id, number=number, error=type(failure).__name__)
        if self.failure is None or number < self._failed_at:
            self.failure, self._failed_at = failure, number
        for other, interruption in self._under_way.items():
            if other > number:
                interruption.request()
        self._bell.ring()

    def _is_out_of_patience(self) -> bool:
        return asyncio.get_running_loop().time() - self._progress_at > PATIENCE_SECONDS

    async def pause(self, pauses: int) -> None:
        """Wait a little longer each time, but for nothing once all is broken off."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(0.5 * 2 ** min(pauses, 10), LONGEST_PAUSE_SECONDS)):
                await self._bell.until(lambda: self.is_broken_off)


def _checkpoint(segment: Segment) -> SpokenSegment | None:
    if segment.key is None or segment.samples is None:
        return None
    return SpokenSegment(segment.key, segment.samples)
