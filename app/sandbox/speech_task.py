"""One synthesis task: text goes in as it arrives, events and audio frames come out (PROTOCOL.md §1.2, §1.5)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from app.sandbox import messages
from app.sandbox.calls import Call
from app.sandbox.characters import count_characters, is_speakable
from app.sandbox.failures import (
    INPUT_MISSING,
    ONE_TEXT_ONLY,
    SSML_UNSUPPORTED,
    TEXT_INVALID,
    ConnectionBroken,
    TaskFailed,
)
from app.sandbox.faults import Breakage
from app.sandbox.options import SandboxOptions
from app.sandbox.outbox import Outbox
from app.sandbox.pace import Pace
from app.sandbox.recording import Frame, Recording
from app.sandbox.script import Line
from app.sandbox.sentences import SentenceCutter
from app.sandbox.silence_clock import SilenceClock
from app.sandbox.speech_order import SpeechOrder
from app.sandbox.spoken_audio import Utterance
from app.sandbox.ssml import looks_like_ssml, read_ssml
from app.sandbox.word_times import Word

LONGEST_MESSAGE: Final = 20_000
LONGEST_TASK: Final = 200_000
"""Characters per continue-task and per task, counted as billed (§1.8)."""


class SpeechTask:
    """Speaks one task. `speak` runs beside the reader of the socket, which hands it the client's messages."""

    def __init__(
        self,
        order: SpeechOrder,
        call: Call,
        outbox: Outbox,
        silence: SilenceClock,
        options: SandboxOptions,
        *,
        breakage: tuple[Breakage, int] | None,
        held: asyncio.Event | None,
    ) -> None:
        self.call = call
        self.finishing = False
        self.utterance = Utterance(order.format)
        self._order = order
        self._outbox = outbox
        self._silence = silence
        self._options = options
        self._breakage = breakage
        self._held = held
        self._pace = Pace(options.speed, options.first_audio_seconds)
        self._recording = Recording(order, options.wav_header)
        self._words: list[Word] = []
        self._cutter = SentenceCutter()
        self._lines: deque[Line] = deque()
        self._arrived = asyncio.Event()
        self._received = 0
        self._speakable = False
        self._characters = 0
        self._index = -1
        self._frames = 0

    def add_text(self, text: object) -> None:
        """Take the text of a continue-task (§1.3, §1.8); SSML comes whole and only once (§1.4)."""
        if not isinstance(text, str) or not text:
            raise TaskFailed(INPUT_MISSING)
        if self._order.ssml and self._received:
            raise TaskFailed(ONE_TEXT_ONLY)
        lines = self._read_markup(text)
        characters = count_characters(text if lines is None else "".join(line.text for line in lines))
        if characters > LONGEST_MESSAGE or self._received + characters > LONGEST_TASK:
            raise TaskFailed(f"The text is longer than {LONGEST_MESSAGE} per message or {LONGEST_TASK} per task.")
        self._received += characters
        self.call.texts.append(text)
        self._pace.start()
        if lines is None:
            self._speakable = self._speakable or is_speakable(text)
            self._cutter.add(text)
            self.utterance.say(text)
        else:
            self.utterance.say("".join(line.text for line in lines))
            self._speakable = bool(lines)
            self._lines.extend(lines)
        self._arrived.set()

    def flush(self) -> None:
        """Speak the unfinished tail now (§1.3)."""
        self.call.flushes += 1
        self._cutter.flush()
        self._arrived.set()

    def finish(self) -> None:
        """No more text will come: speak what is left and end (§1.2)."""
        if not self._speakable:
            raise TaskFailed(TEXT_INVALID)
        self._cutter.flush()
        self.finishing = True
        self._arrived.set()

    async def speak(self) -> None:
        """Speak until the task is finished. Cancelling this is how a task is stopped."""
        ended = False
        while (line := await self._next_line()) is not None:
            ended = await self._speak_line(line)
        if not ended:
            await self._deliver(self._recording.finish(), 0)
        self.call.characters = self._characters + count_characters(self._cutter.take_silent_rest())

    def finished(self) -> str:
        """The task-finished event, with the count and the words so far (§1.5)."""
        at_the_end = self._order.word_timestamps and self._options.words_in == "task-finished"
        return messages.task_finished(self.call.task_id, self.call.characters, self._words if at_the_end else None)

    async def _next_line(self) -> Line | None:
        while True:
            if self._lines:
                return self._lines.popleft()
            if sentence := self._cutter.take():
                return Line(sentence)
            if self.finishing:
                return None
            self._silence.go_on()
            self._arrived.clear()
            await self._arrived.wait()

    async def _speak_line(self, line: Line) -> bool:
        """Send one sentence; True if the end of the stream went with it."""
        self._index += 1
        task_id = self.call.task_id
        ended = False

        def is_last() -> bool:
            nonlocal ended
            ended = self._is_last()
            return ended

        characters = count_characters(line.text)
        await self._outbox.put(messages.sentence_begin(task_id, self._index, self._original(line)))
        await self._deliver(self._recording.record(line, is_last), characters)
        self._characters += characters
        self.call.characters = self._characters
        words = await asyncio.to_thread(self._recording.words, line.text) if self._order.word_timestamps else []
        self._words += words
        shown = words if self._options.words_in == "sentence-end" else []
        original = self._original(line)
        await self._outbox.put(messages.sentence_end(task_id, self._index, original, shown, self._characters))
        return ended

    def _is_last(self) -> bool:
        """Whether nothing follows the sentence that is being spoken, as far as one can know."""
        return self.finishing and not self._lines and not self._cutter.holds_speech()

    def _original(self, line: Line) -> str | None:
        return line.text if self._options.last_original_text or not self._is_last() else None

    async def _deliver(self, batches: Iterator[list[Frame]], characters: int) -> None:
        announcement = messages.sentence_synthesis(self.call.task_id, self._index)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            for frame in batch:
                if await self._breaks():
                    continue
                if not self._frames:
                    await self._wait_for_first_audio()
                self._silence.stop()
                await self._pace.wait(frame.until)
                self._frames += 1
                self.utterance.hear(frame.data)
                await self._outbox.put(announcement, frame.data, on_sent=self._note(frame, characters))

    def _note(self, frame: Frame, characters: int) -> Callable[[], None]:
        spoken = self._characters + round(frame.share * characters)

        def note() -> None:
            self.call.audio_frames += 1
            self.call.audio_bytes += len(frame.data)
            if self.call.outcome is None:
                self.call.characters = max(self.call.characters, spoken)

        return note

    async def _wait_for_first_audio(self) -> None:
        if self._held is not None:
            await self._held.wait()
        await self._pace.wait_for_first()

    async def _breaks(self) -> bool:
        """Break if told to by now; True if the audio that is left is not to be sent."""
        if self._breakage is None or self._frames < self._breakage[1]:
            return False
        how = self._breakage[0]
        if how == "fail":
            raise TaskFailed("An internal error has occured, please try again later.", "InternalError")
        if how == "close":
            raise ConnectionBroken
        if how == "silent":
            self._silence.stop()
            await asyncio.Event().wait()
        if malformed := messages.MALFORMED.get(how):
            self._breakage = None
            await self._outbox.put(malformed(self.call.task_id))
        return how == "truncate"

    def _read_markup(self, text: str) -> list[Line] | None:
        """The lines of an SSML text, None for plain text. Without `enable_ssml` tags are plain text too."""
        if not self._order.ssml or not looks_like_ssml(text):
            return None
        if not self._order.voice.ssml:
            raise TaskFailed(SSML_UNSUPPORTED)
        return read_ssml(text)
