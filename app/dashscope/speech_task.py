"""One synthesis on one connection (PROTOCOL §1.2)."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import structlog
from websockets.exceptions import ConnectionClosed

from app import metrics, timing
from app.dashscope import frames
from app.dashscope.failures import explain, plain
from app.dashscope.frames import Event, MalformedEvent, SpeechParameters
from app.dashscope.pool import Connection
from app.dashscope.timeline import Timeline
from app.errors import AppError, ConnectionLost, Throttled, UpstreamError, UpstreamTimeout
from app.transcripts import storable

log = structlog.get_logger(__name__)

# A reused socket that does not answer `run-task` within this is taken for dead and replaced.
REUSED_START_SECONDS = 5.0
# A provider that goes on speaking for longer than this after a cancel is left.
CANCEL_SECONDS = 5.0
# Slow speech takes half a second for a character, a pause in SSML no more for each of its own. A provider that goes on
# for eight times as long does not speak our text.
SECONDS_PER_CHARACTER = 4.0
SECONDS_BESIDE = 60.0
SAMPLE_BYTES = 2
BYTES_BESIDE = 64 * 1024 * 1024
MAX_REQUEST_ID_CHARS = 128


@dataclass(slots=True)
class Usage:
    """What the provider said that a synthesis used, kept by the caller so that no failure loses it.

    `characters` is the last cumulative count (§1.5), `request_id` the provider's name for the task.
    """

    characters: int = 0
    request_id: str | None = None


class SpeechTask:
    """A running synthesis. One reader only: whoever iterates `audio()`; text and `cancel()` may come from elsewhere."""

    def __init__(
        self,
        connection: Connection,
        parameters: SpeechParameters,
        usage: Usage,
        silence_seconds: float,
        timeline: Timeline | None = None,
    ) -> None:
        self.connection = connection
        self.id = uuid.uuid4().hex
        self.usage = usage
        self.accepted = False
        self.finished = False
        self._parameters = parameters
        self._silence_seconds = silence_seconds
        self._timeline = timeline
        self._silence: asyncio.Timeout | None = None
        self._answer_is_due = True
        self._give_up_at = math.inf
        self.cancelled = False
        self._work_began = False
        self._bearable_seconds = SECONDS_BESIDE
        self._heard_bytes = 0
        self._began_at = time.perf_counter()
        self._text_sent_at: float | None = None
        self._heard = False
        self._first: bytes | None = None
        usage.characters, usage.request_id = 0, self.id
        timing.note(provider_request_id=self.id)

    async def submit(self) -> None:
        """Ask for the task; this is what the provider's rate limit counts (§1.10). Raises ConnectionLost."""
        await self._send(frames.run_task(self.id, self._parameters))

    async def wait_until_started(self) -> None:
        """Wait until the provider is ready for text. No work is accepted yet.

        Raises ConnectionLost, UpstreamTimeout, or what `task-failed` means.
        """
        reused = self.connection.reused
        try:
            async with asyncio.timeout(
                min(REUSED_START_SECONDS, self._silence_seconds) if reused else self._silence_seconds
            ):
                await self._read_until_started()
        except (TimeoutError, UpstreamTimeout) as error:
            raise (ConnectionLost if reused else UpstreamTimeout) from error

    async def speak(self, text: str) -> None:
        """Send the whole text, and wait until the provider answers with audio, the end, or a failure."""
        self._expect_speech(text)
        self._give_up_at = self._last_moment
        self.accepted = self.connection.is_open
        self._text_sent_at = time.perf_counter()
        with suppress(ConnectionLost):  # why it was closed is told to whoever reads
            await self._send(frames.continue_task(self.id, text))
            await self._send(frames.finish_task(self.id))
        self._first = await self._next_audio()

    async def say(self, text: str) -> None:
        """Send some of the text; more may follow, within 23 s (§1.7). What is sent after the end is not spoken.

        Raises UpstreamTimeout when the provider takes nothing more.
        """
        self._expect_speech(text)
        self.accepted = self.accepted or self.connection.is_open
        self._text_sent_at = self._text_sent_at or time.perf_counter()
        self._answer_is_due = False  # an unfinished sentence is held back without a word
        await self._tell(frames.continue_task(self.id, text))

    async def flush(self) -> None:
        """Have the unfinished sentence spoken. Raises UpstreamTimeout when the provider takes nothing more."""
        await self._tell(frames.flush_task(self.id))

    async def finish(self) -> None:
        """Say that no more text comes. Raises UpstreamTimeout when the provider takes nothing more."""
        self._answer_is_due = True
        self._give_up_at = min(self._give_up_at, self._last_moment)
        self._be_answered_by(asyncio.get_running_loop().time() + self._silence_seconds)
        await self._tell(frames.finish_task(self.id))

    async def audio(self) -> AsyncIterator[bytes]:
        """Yield the audio frames as they arrive, to the end of the task.

        Raises ConnectionLost, UpstreamTimeout, or what `task-failed` means; `usage` stays valid.
        """
        frame, self._first = self._first, None
        while frame or (frame := await self._next_audio()) is not None:
            yield frame
            frame = None

    async def cancel(self) -> None:
        """Tell the provider to stop. What it spoke until then arrives with the count, and `audio()` ends soon."""
        if self.finished or self.cancelled:
            return
        self.cancelled = True
        self._give_up_at = asyncio.get_running_loop().time() + CANCEL_SECONDS
        self._be_answered_by(self._give_up_at)
        try:
            await self._send(frames.cancel_task(self.id))
        except (ConnectionLost, UpstreamTimeout):
            log.info("provider_gone_before_cancel", task_id=self.id)

    def note_end(self) -> None:
        """Count the time that it took, whatever became of it."""
        metrics.PROVIDER_CALL_SECONDS.labels("speech").observe(time.perf_counter() - self._began_at)

    def _note_first_audio(self) -> None:
        if self._text_sent_at is not None and not self._heard:
            self._heard = True
            metrics.PROVIDER_FIRST_AUDIO_SECONDS.observe(time.perf_counter() - self._text_sent_at)

    async def _read_until_started(self) -> None:
        while True:
            message = await self._receive()
            if isinstance(message, bytes):
                raise self._violation("audio before task-started")
            if message.task_id not in {None, self.id}:
                continue  # the late word of a task that was cancelled on this socket
            if message.name == "task-started":
                return
            if message.name == "task-failed":
                raise self._failure(message)
            if message.name in {"result-generated", "task-finished"}:
                raise self._violation(f"{message.name} before task-started")

    async def _next_audio(self) -> bytes | None:
        while not self.finished:
            message = await self._receive()
            if isinstance(message, bytes):
                self._note_first_audio()
                self._work_began = True
                self._heard_bytes += len(message)
                bearable_bytes = self._bearable_seconds * self._parameters.sample_rate * SAMPLE_BYTES
                if self._heard_bytes > BYTES_BESIDE + bearable_bytes:
                    raise self._violation("audio without end")
                if self._timeline is not None:
                    self._timeline.hear(message)
                return message
            if message.task_id not in {None, self.id}:
                raise self._violation("event of another task")
            if message.characters is not None:
                self.usage.characters = message.characters
            if message.request_id:
                self.usage.request_id = storable(message.request_id)[:MAX_REQUEST_ID_CHARS]
                timing.note(provider_request_id=plain(message.request_id))
            if message.name == "task-failed":
                raise self._failure(message)
            if self._timeline is not None:
                self._timeline.note(message)
            self._work_began = True
            self.finished = message.name == "task-finished"
        return None

    async def _receive(self) -> bytes | Event:
        try:
            silent_at = asyncio.get_running_loop().time() + self._silence_seconds
            deadline = min(silent_at if self._answer_is_due else math.inf, self._give_up_at)
            # While the provider waits for more text, nobody waits for the provider.
            waiting = timing.measure("provider") if self._answer_is_due else nullcontext()
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline) as self._silence:
                with waiting:
                    message = await self.connection.socket.recv()
        except TimeoutError as error:
            raise UpstreamTimeout from error
        except ConnectionClosed as error:
            raise ConnectionLost from error
        finally:
            self._silence = None
        if isinstance(message, bytes):
            return message
        try:
            return frames.parse_event(message)
        except MalformedEvent as error:
            raise self._violation(f"malformed event: {error}") from error

    def _expect_speech(self, text: str) -> None:
        self._bearable_seconds += SECONDS_PER_CHARACTER * len(text)

    @property
    def _last_moment(self) -> float:
        """When all that was asked for until now is heard, or never will be."""
        return asyncio.get_running_loop().time() + self._silence_seconds + self._bearable_seconds

    def _be_answered_by(self, deadline: float) -> None:
        """Let whoever reads now wait no longer than that."""
        if self._silence is not None and not self._silence.expired():
            self._silence.reschedule(min(self._silence.when() or math.inf, deadline))

    async def _tell(self, message: str) -> None:
        if self.finished or self.cancelled:
            return
        with suppress(ConnectionLost):  # why it was closed is told to whoever reads
            await self._send(message)

    async def _send(self, message: str) -> None:
        try:
            async with asyncio.timeout(self._silence_seconds):
                await self.connection.socket.send(message)
        except TimeoutError as error:
            raise UpstreamTimeout from error
        except ConnectionClosed as error:
            raise ConnectionLost from error

    def _failure(self, event: Event) -> AppError:
        error = explain(event.error_code, event.error_message)
        if isinstance(error, Throttled) and not self._work_began and not self.usage.characters:
            self.accepted = False  # throttled before work (§1.10)
        log.warning("provider_task_failed", task_id=self.id, provider_code=plain(event.error_code), error=error.code)
        return error

    def _violation(self, what: str) -> AppError:
        """The provider broke the protocol; on a reused socket that has not answered yet, it is taken for dead."""
        log.warning("provider_broke_protocol", task_id=self.id, what=what)
        if self.connection.reused and not self.accepted:
            return ConnectionLost()
        error = UpstreamError("百炼平台返回了无法识别的消息，请稍后重试")
        error.is_its_fault = True
        return error
