"""One utterance of a live session: text that comes bit by bit, spoken at once, kept and billed as one record.

The provider gives up a task that gets no text for 23 s (PROTOCOL §1.7). A client who pauses longer is not to notice:
the task is finished before that, and the next text begins another one.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from decimal import Decimal

import structlog

from app.catalog import count_characters
from app.chaining import create_chain
from app.completion import end_by_cancelling
from app.dashscope import Credential, Interruption, SpeechClient, SpeechParameters, SpeechTask, Usage
from app.database import UNAVAILABLE
from app.errors import Abandoned, TextTooLong
from app.services.admission import describe
from app.services.calls import CutOff, OpenRecord
from app.services.inbox import Inbox, Mark
from app.services.records import RecordService
from app.services.spool import Spool

log = structlog.get_logger(__name__)

PAUSE_SECONDS = 15.0
# The provider takes 200,000 characters in a task (PROTOCOL §1.8).
MAX_TASK_CHARACTERS = 190_000
PIECE_CHARS = 1000  # at most 2000 as the provider counts them
NOTING_SECONDS = 1.0
NOTED_AT_ONCE_CHARS = 2000
# How long it is believed that a user has no budget.
UNLIMITED_SECONDS = 10.0

Listen = Callable[[bytes], Awaitable[None]]
HoldBack = Callable[[int, Decimal], Awaitable[bool]]
"""`BudgetService.hold_back` for one user: of a record, what it will cost."""


class Utterance:
    """From the first text to the end, a cancellation or a hang-up.

    `was_idle` says that it ended because the client said nothing any more, `is_over` that nothing more will be heard.
    """

    def __init__(
        self,
        speech: SpeechClient,
        records: RecordService,
        hold_back: HoldBack,
        parameters: SpeechParameters,
        inbox: Inbox,
        idle_seconds: float,
        max_chars: int,
    ) -> None:
        self._speech = speech
        self._records = records
        self._hold_back = hold_back
        self._parameters = parameters
        self._inbox = inbox
        self._idle_seconds = idle_seconds
        self._max_chars = max_chars
        self._interruption = Interruption()
        self._texts: list[str] = []
        self._chars = 0
        self._pending: deque[str] = deque()
        self._accepted_characters = 0
        self._unlimited_until = 0.0
        self._sent_characters = 0
        self._noting_in_turn = asyncio.Lock()
        self._counted_characters = 0
        self._noting: asyncio.Task[None] | None = None
        self._is_noted = False
        self._spoke_at = 0.0
        self._ended = False
        self.cut_off: CutOff | None = None
        self.was_idle = False
        self.is_over = False

    def stop(self, why: CutOff) -> None:
        """Say no more. The first reason counts."""
        self.cut_off = self.cut_off or why
        self._interruption.request()
        self._inbox.wake()

    async def speak(self, record: OpenRecord, credential: Credential, first: str, spool: Spool, hear: Listen) -> None:
        """Speak to the end. What was said and counted is in the record whatever happens.

        Raises the AppError of a failure.
        """
        chain = create_chain(self._parameters.format)

        async def pass_on(samples: bytes) -> None:
            if samples:
                await spool.write(samples)
                await hear(samples)
                self._spoke_at = asyncio.get_running_loop().time()

        try:
            self._accept([first])
            while self._pending or await self._wait_for_text(record):
                chain.next_stream()
                await self._speak_task(record, credential, lambda piece: pass_on(chain.feed(piece)))
        except Abandoned:
            return  # stopped before it was begun: nothing was bought
        finally:
            record.quantity, record.input_data = self._counted_characters, self._described
            if self._noting is not None:
                await end_by_cancelling(self._noting)
            await pass_on(chain.end())
            self.is_over = True
            record.cut_off = self.cut_off

    async def _speak_task(self, record: OpenRecord, credential: Credential, hear: Listen) -> None:
        """Have one task say what there is, until the end or a long pause."""
        usage = Usage()
        first = self._pending.popleft()

        async def foresee() -> None:
            await self._stake(record, count_characters(first))

        try:
            async with self._speech.converse(
                credential, self._parameters, first, usage, foresee, self._interruption
            ) as task:
                feeding = asyncio.create_task(self._feed(record, task, count_characters(first)))
                feeding.add_done_callback(self._interrupt_if_failed)
                try:
                    async for piece in task.audio():
                        await hear(piece)
                finally:
                    await end_by_cancelling(feeding)
                if not feeding.cancelled():
                    feeding.result()
        finally:
            self._counted_characters += usage.characters
            record.provider_request_id = usage.request_id

    async def _feed(self, record: OpenRecord, task: SpeechTask, characters: int) -> None:
        """Pass on what the client says, until he ends or pauses, or the task has had as much as it takes."""
        loop = asyncio.get_running_loop()
        pause_ends = loop.time() + PAUSE_SECONDS
        while True:
            if not self._pending:
                seconds = min(pause_ends - loop.time(), self._idle_seconds_left)
                item = await self._inbox.take(seconds, self._is_stopped)
                if item is Mark.FLUSH:
                    await task.flush()
                    continue
                self._ended = item is Mark.END
                if not isinstance(item, str):
                    break
                self._accept([item])
                await self._afford(record)
                pause_ends = loop.time() + PAUSE_SECONDS
            characters += count_characters(self._pending[0])
            if characters > MAX_TASK_CHARACTERS:
                break
            piece = self._pending.popleft()
            await self._stake(record, count_characters(piece))
            await task.say(piece)
        if not self._is_stopped():
            await task.finish()

    async def _wait_for_text(self, record: OpenRecord) -> bool:
        """Wait for something speakable to begin another task with. False when nothing more is to be said."""
        if self._ended or self._is_stopped():
            return False
        heard = await self._inbox.take_speakable(self._idle_seconds_left, self._is_stopped)
        self.was_idle = heard is None and not self._is_stopped()
        if not isinstance(heard, list):
            return False
        self._accept(heard)
        await self._afford(record)
        return True

    def _accept(self, texts: list[str]) -> None:
        self._chars += sum(map(len, texts))
        if self._chars > self._max_chars:
            raise TextTooLong(f"一次语音不能超过 {self._max_chars} 个字符，请发送 end 后继续")
        self._texts += texts
        text = "".join(texts)
        self._accepted_characters += count_characters(text)
        # The provider puts the pieces together again: where they are cut is nothing to hear.
        self._pending.extend(text[begin : begin + PIECE_CHARS] for begin in range(0, len(text), PIECE_CHARS))

    async def _afford(self, record: OpenRecord) -> None:
        """Have the user's budget hold back what was accepted so far, before it is sent. Raises BudgetExceeded."""
        now = asyncio.get_running_loop().time()
        if record.price.per_unit and now >= self._unlimited_until:
            cost = self._accepted_characters * record.price.per_unit
            if not await self._hold_back(record.id, cost):
                self._unlimited_until = now + UNLIMITED_SECONDS

    @property
    def _idle_seconds_left(self) -> float:
        """How long nothing may come from the client any more, and nothing be heard by him."""
        active_at = max(self._inbox.heard_at, self._spoke_at)
        return self._idle_seconds - (asyncio.get_running_loop().time() - active_at)

    async def _stake(self, record: OpenRecord, characters: int) -> None:
        """Write down what is at stake should this process die, before it is."""
        self._sent_characters += characters
        is_short = self._chars <= NOTED_AT_ONCE_CHARS
        async with self._noting_in_turn:
            said = self._described if is_short else None
            await self._records.foresee(record, self._sent_characters, said)
        if not is_short:
            self._note(record)

    def _note(self, record: OpenRecord) -> None:
        """Write down beside the work what was said: of a long text, at most once a while."""
        self._is_noted = False
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._write_down(record))

    async def _write_down(self, record: OpenRecord) -> None:
        while not self._is_noted:
            self._is_noted = True
            try:
                async with self._noting_in_turn:
                    await self._records.note(record, self._sent_characters, self._described)
            except UNAVAILABLE as error:
                log.warning("utterance_not_noted", record_id=record.id, error=type(error).__name__)
            await asyncio.sleep(NOTING_SECONDS)

    def _interrupt_if_failed(self, feeding: "asyncio.Task[None]") -> None:
        if not feeding.cancelled() and feeding.exception() is not None:
            self._interruption.request()

    def _is_stopped(self) -> bool:
        return self._interruption.requested

    @property
    def _described(self) -> str:
        return describe(self._parameters, "".join(self._texts))
