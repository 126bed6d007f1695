"""One WebSocket of the CosyVoice service: order of messages, timeouts and the end of tasks (PROTOCOL.md §1.2-§1.7).

One coroutine decides everything; it waits for the client, for the task that speaks and for the clock at once, so that a
cancel is heard while audio is being sent. All writing goes through one `Outbox`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from app.sandbox import messages
from app.sandbox.calls import Call, CallLog, Outcome
from app.sandbox.enrolled_voices import VoiceBook
from app.sandbox.failures import (
    INPUT_MISSING,
    ConnectionBroken,
    InvalidFrame,
    TaskFailed,
    invalid_parameter,
    missing_parameter,
)
from app.sandbox.faults import Faults
from app.sandbox.messages import ClientMessage, read_message
from app.sandbox.options import SandboxOptions
from app.sandbox.outbox import Outbox, PeerGone
from app.sandbox.run_task_quota import RunTaskQuota, throttled
from app.sandbox.silence_clock import SilenceClock
from app.sandbox.speech_order import read_model, read_order
from app.sandbox.speech_task import SpeechTask
from app.sandbox.spoken_audio import SpokenAudio

_log = logging.getLogger("app.sandbox")

_NORMAL_CLOSURE: Final = 1000
_UNSUPPORTED_DATA: Final = 1003
_INVALID_PAYLOAD: Final = 1007
_INTERNAL_ERROR: Final = 1011
_TASK_IDS_REMEMBERED: Final = 4096
_PATIENCE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who opened a socket."""

    connection: int
    api_key: str


class _Close(Exception):
    """The server ends the connection."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class SpeechSocket:
    """Holds the conversation on an accepted socket."""

    def __init__(
        self,
        websocket: WebSocket,
        caller: Caller,
        options: SandboxOptions,
        calls: CallLog,
        quota: RunTaskQuota,
        faults: Faults,
        spoken: SpokenAudio,
        voices: VoiceBook,
    ) -> None:
        self._websocket = websocket
        self._caller = caller
        self._options = options
        self._calls = calls
        self._quota = quota
        self._faults = faults
        self._spoken = spoken
        self._enrolled = partial(voices.speaker, caller.api_key)
        self._outbox = Outbox(self._send)
        self._task: SpeechTask | None = None
        self._speaking: asyncio.Task[None] | None = None
        self._used_task_ids: deque[str] = deque(maxlen=_TASK_IDS_REMEMBERED)
        self._silence = SilenceClock(options.idle_timeout_seconds)

    async def converse(self) -> None:
        """Serve tasks until either side closes."""
        writer = asyncio.create_task(self._outbox.write())
        try:
            await self._serve()
        except WebSocketDisconnect:
            await self._stop_speaking("disconnected")
        except _Close as close:
            if self._task is not None:
                await self._stop_speaking("failed")
                self._outbox.discard()
            await self._close(close)
        finally:
            await self._stop_speaking("disconnected")
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _serve(self) -> None:
        receiving: asyncio.Task[Mapping[str, Any]] | None = None
        clock: asyncio.Task[None] | None = None
        try:
            while True:
                if receiving is None:
                    await self._outbox.room_for_answers()
                    receiving = asyncio.create_task(self._receive())
                if clock is None:
                    clock = asyncio.create_task(self._silence.run_out())
                waiting: set[asyncio.Task[Any]] = {receiving, clock}
                if self._speaking is not None:
                    waiting.add(self._speaking)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._speaking is not None and self._speaking.done():
                    self._conclude(self._speaking)
                elif receiving.done():
                    message, receiving = receiving.result(), None
                    await self._read(message)
                elif clock.done():
                    clock.result()
                    clock = None
                    await self._time_out()
        finally:
            left = [task for task in (receiving, clock) if task is not None]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _receive(self) -> Mapping[str, Any]:
        return await self._websocket.receive()

    async def _read(self, frame: Mapping[str, Any]) -> None:
        if frame["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(frame.get("code", 1005))
        text = frame.get("text")
        if text is None:
            raise _Close(_UNSUPPORTED_DATA, "only text frames are understood")
        try:
            message = read_message(text)
        except InvalidFrame:
            raise _Close(_INVALID_PAYLOAD, "Invalid payload data") from None
        try:
            await self._obey(message)
        except TaskFailed as failure:
            await self._fail(message.task_id, failure)

    async def _obey(self, message: ClientMessage) -> None:
        if not message.action:
            raise missing_parameter("header.action")
        if not message.task_id:
            raise missing_parameter("header.task_id")
        if message.action == "run-task":
            await self._run_task(message)
        elif message.action == "continue-task":
            self._continue_task(self._running(message), message)
        elif message.action == "finish-task":
            await self._finish_task(message)
        else:
            raise invalid_parameter("header.action")

    async def _run_task(self, message: ClientMessage) -> None:
        """Begin a task (§1.3); one that is running ends with what it has spoken (§1.7)."""
        await self._end_early("replaced")
        parameters = message.payload.get("parameters")
        call = Call(
            connection=self._caller.connection,
            api_key=self._caller.api_key,
            task_id=message.task_id,
            model=str(message.payload.get("model") or ""),
            parameters=parameters if isinstance(parameters, dict) else {},
        )
        self._calls.add(call)
        try:
            task = self._create_task(message, call)
        except TaskFailed as failure:
            call.fail(failure)
            raise
        self._used_task_ids.append(message.task_id)
        self._outbox.post(messages.task_started(message.task_id))
        self._task = task
        self._silence.start(self._options.gap_timeout_seconds)
        self._speaking = asyncio.create_task(task.speak())

    def _create_task(self, message: ClientMessage, call: Call) -> SpeechTask:
        if message.streaming != "duplex":
            raise missing_parameter("header.streaming")
        if message.task_id in self._used_task_ids:
            raise invalid_parameter("header.task_id")
        model = read_model(message.payload)
        if self._faults.take("throttle_tasks"):
            raise throttled()
        self._quota.take(self._caller.api_key, model)
        order = read_order(model, message.payload, self._enrolled)
        call.format, call.sample_rate = order.format, order.sample_rate
        breaks = self._faults.take("break_tasks")
        return SpeechTask(
            order,
            call,
            self._outbox,
            self._silence,
            self._options,
            breakage=(self._faults.break_how, self._faults.break_after_frames) if breaks else None,
            held=self._faults.take_hold(),
        )

    def _running(self, message: ClientMessage) -> SpeechTask:
        """The task that a message belongs to; text before a task or for another one is refused (§1.2, §1.7)."""
        if self._task is None or self._task.call.task_id != message.task_id or self._task.finishing:
            raise invalid_parameter("header.task_id")
        return self._task

    def _continue_task(self, task: SpeechTask, message: ClientMessage) -> None:
        """Hand text or a flush to the task. Only text puts the gap's end off (§1.7)."""
        task.call.messages += 1
        said = message.payload.get("input")
        if not isinstance(said, dict):
            raise TaskFailed(INPUT_MISSING)
        flush = said.get("flush") is True
        if not flush or said.get("text"):
            task.add_text(said.get("text"))
            self._silence.start_over()
        if flush:
            task.flush()

    async def _finish_task(self, message: ClientMessage) -> None:
        said = message.payload.get("input")
        if not isinstance(said, dict):
            raise TaskFailed(INPUT_MISSING)
        if said.get("directive") == "cancel":
            await self._cancel_task(message)
            return
        self._running(message).finish()
        self._silence.stop()

    async def _cancel_task(self, message: ClientMessage) -> None:
        """Stop at once with the count so far (§1.3). A cancel that crosses the task's own end is late, not wrong."""
        if self._task is not None and self._task.call.task_id == message.task_id:
            await self._end_early("cancelled")
        elif self._task is not None or message.task_id not in self._used_task_ids:
            raise invalid_parameter("header.task_id")

    async def _end_early(self, outcome: Outcome) -> None:
        task = self._task
        if task is None:
            return
        await self._stop_speaking(outcome)
        self._outbox.discard()
        self._outbox.post(task.finished())

    def _conclude(self, speaking: asyncio.Task[None]) -> None:
        """The task has spoken everything, or a fault broke it."""
        assert self._task is not None  # noqa: S101 - a task speaks as long as it is here
        task, call = self._task, self._task.call
        failure = speaking.exception()
        self._task = self._speaking = None
        self._silence.start(self._options.idle_timeout_seconds)
        if isinstance(failure, TaskFailed):
            call.fail(failure)
            self._outbox.post(messages.task_failed(call.task_id, failure.code, failure.message))
            raise _Close(_NORMAL_CLOSURE)
        if isinstance(failure, ConnectionBroken):
            call.end("failed")
            raise _Close(_INTERNAL_ERROR)
        if failure is not None:
            call.end("failed")
            raise failure
        call.end("finished")
        self._spoken.remember(task.utterance)
        self._outbox.post(task.finished())

    async def _fail(self, task_id: str, failure: TaskFailed) -> None:
        """Send task-failed, for the running task if there is one, and close (§1.7)."""
        if self._task is not None:
            call = self._task.call
            task_id = call.task_id
            call.note(failure)
            await self._stop_speaking("failed")
            self._outbox.discard()
        self._outbox.post(messages.task_failed(task_id, failure.code, failure.message))
        raise _Close(_NORMAL_CLOSURE)

    async def _stop_speaking(self, outcome: Outcome) -> None:
        task, speaking = self._task, self._speaking
        self._task = self._speaking = None
        if task is None or speaking is None:
            return
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)
        task.call.end(outcome)
        self._silence.start(self._options.idle_timeout_seconds)

    async def _time_out(self) -> None:
        if not self._silence.has_run_out:
            return
        if self._task is None:
            raise _Close(_NORMAL_CLOSURE, "idle for too long")
        seconds = f"{self._options.gap_timeout_seconds:g}"
        await self._fail(self._task.call.task_id, TaskFailed(f"request timeout after {seconds} seconds."))

    async def _send(self, message: str | bytes) -> None:
        try:
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)
        except (WebSocketDisconnect, WebSocketDisconnected) as error:
            raise PeerGone from error

    async def _close(self, close: _Close) -> None:
        """Send the last words and close; a peer that reads neither is cut off."""
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._outbox.drain()
                await self._websocket.close(close.code, close.reason)
        except (WebSocketDisconnect, WebSocketDisconnected, TimeoutError):
            _log.debug("sandbox connection %d did not hear its closing", self._caller.connection)
