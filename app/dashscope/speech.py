"""Speaking text through CosyVoice: queue, connect, retry what is safe to retry, stop when asked to."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import structlog
from anyio import CancelScope

from app.dashscope.credential import Credential
from app.dashscope.failures import may_retry
from app.dashscope.frames import SpeechParameters
from app.dashscope.pool import ConnectionPool
from app.dashscope.retries import Patience
from app.dashscope.speech_task import SpeechTask, Usage
from app.dashscope.timeline import Timeline
from app.errors import Abandoned, AppError, ConnectionLost
from app.probes import OK, provider_call, provider_retry
from app.timing import measure
from app.turns import FairTurns

log = structlog.get_logger(__name__)


class Interruption:
    """Lets somebody stop a synthesis at any moment: for nothing until its text is sent, by a cancel afterwards."""

    def __init__(self) -> None:
        self.requested = False
        self._act: Callable[[], object] | None = None

    def request(self) -> None:
        """Stop the synthesis as soon as possible. Harmless when asked twice, or after the end."""
        self.requested = True
        if self._act is not None:
            self._act()

    @contextmanager
    def acting_by(self, act: Callable[[], object]) -> Iterator[None]:
        """Inside the block, a request is carried out by `act`; at once when it was made before."""
        self._act = act
        try:
            if self.requested:
                act()
            yield
        finally:
            self._act = None


async def _nothing() -> None:
    """Nothing is to be done before the text is sent."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What a synthesis needs besides its text, and where it tells what came of it."""

    credential: Credential
    parameters: SpeechParameters
    usage: Usage
    before_text: Callable[[], Awaitable[None]]
    interruption: Interruption
    timeline: Timeline | None = None


class SpeechClient:
    """Speaks text through CosyVoice, with retries that can never buy the same text twice."""

    def __init__(
        self,
        pool: ConnectionPool,
        wait_for_turn: Callable[[Credential, str], Awaitable[None]],
        submissions_at_once: int,
        silence_seconds: float,
    ) -> None:
        self._pool = pool
        self._wait_for_turn = wait_for_turn
        self._submissions_at_once = submissions_at_once
        self._silence_seconds = silence_seconds
        self._lines: WeakValueDictionary[tuple[Credential, str], FairTurns] = WeakValueDictionary()
        self._cancelling: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def speak(
        self,
        credential: Credential,
        parameters: SpeechParameters,
        text: str,
        usage: Usage,
        before_text: Callable[[], Awaitable[None]] = _nothing,
        interruption: Interruption | None = None,
        timeline: Timeline | None = None,
    ) -> AsyncIterator[SpeechTask]:
        """Run one synthesis; the block starts once the provider has begun to answer, and reads `task.audio()`.

        Money begins with the text: `before_text` is awaited right before it is sent, and no interruption breaks it
        off. Raises whatever ended the task, or Abandoned when it was interrupted before the text; `usage` holds what
        the provider counted until then, `timeline` when each sentence is heard.
        """
        order = _Order(credential, parameters, usage, before_text, interruption or Interruption(), timeline)
        async with self._running(order, lambda task: task.speak(text)) as task:
            yield task

    @asynccontextmanager
    async def converse(
        self,
        credential: Credential,
        parameters: SpeechParameters,
        text: str,
        usage: Usage,
        before_text: Callable[[], Awaitable[None]] = _nothing,
        interruption: Interruption | None = None,
    ) -> AsyncIterator[SpeechTask]:
        """Run a synthesis whose text comes bit by bit; the block starts once the first of it was sent.

        The rest goes by `task.say()` and `task.finish()`, beside whoever reads `task.audio()`. Else like `speak`.
        """
        order = _Order(credential, parameters, usage, before_text, interruption or Interruption())
        async with self._running(order, lambda task: task.say(text)) as task:
            yield task

    async def verify(self, credential: Credential) -> None:
        """Prove that the provider takes this key: it is checked in the handshake, which costs nothing (§1.1).

        Raises InvalidApiKey, Throttled, ConnectionLost or HandshakeTimeout.
        """
        with provider_call("speech"):
            self._pool.release(await self._pool.acquire(credential, fresh=True))

    @asynccontextmanager
    async def _running(
        self, order: _Order, send_text: Callable[[SpeechTask], Awaitable[None]]
    ) -> AsyncIterator[SpeechTask]:
        with provider_call("speech", order.parameters.model) as call:
            task = await self._begin(order, send_text)
            try:
                with order.interruption.acting_by(partial(self._cancel, task)):
                    yield task
            finally:
                if task.finished:  # what broke later is not the provider's
                    call.outcome = OK
                self._leave(task)

    async def _begin(self, order: _Order, send_text: Callable[[SpeechTask], Awaitable[None]]) -> SpeechTask:
        interruption = order.interruption
        patience = Patience(self._silence_seconds)
        needs_turn = True
        for attempt in itertools.count(1):
            if interruption.requested:
                raise Abandoned
            task: SpeechTask | None = None
            try:
                with CancelScope() as scope, interruption.acting_by(scope.cancel):
                    task = await self._submit(order, patience, fresh=attempt > 1, needs_turn=needs_turn)
                    await task.wait_until_started()
                if not interruption.requested:
                    await order.before_text()
                if task is None or interruption.requested:
                    raise Abandoned
                with interruption.acting_by(partial(self._cancel, task)):
                    await send_text(task)
            except BaseException as error:
                if task is not None:
                    self._leave(task)
                accepted = task is not None and task.accepted
                if not isinstance(error, AppError) or not may_retry(error, accepted=accepted):
                    raise
                # A reused socket that was dead is replaced at once, whatever time that took to find out: happens once.
                was_dead = task is not None and task.connection.reused and isinstance(error, ConnectionLost)
                pause_seconds = 0.0 if was_dead else patience.pause_seconds(attempt, error)
                if pause_seconds is None:
                    raise
                log.info("provider_retry", attempt=attempt, error=type(error).__name__)
                needs_turn = not was_dead
            else:
                return task
            with provider_retry(), CancelScope() as scope, interruption.acting_by(scope.cancel):
                await asyncio.sleep(pause_seconds)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _submit(self, order: _Order, patience: Patience, *, fresh: bool, needs_turn: bool) -> SpeechTask:
        """Queue, connect, take a turn and ask for the task. No more callers hold a connection than may submit.

        Users of one key come in turn, so that none waits for the whole of another's burst.
        """
        credential, parameters = order.credential, order.parameters
        line = self._lines.setdefault((credential, parameters.model), FairTurns(self._submissions_at_once))
        async with AsyncExitStack() as held:
            with patience.stopped(), measure("queue"):
                await held.enter_async_context(line.taken(credential.user))
            connection = await self._pool.acquire(credential, fresh=fresh)
            try:
                if needs_turn:
                    with patience.stopped():
                        await self._wait_for_turn(credential, parameters.model)
                if not connection.is_open:
                    self._pool.discard(connection)
                    connection = await self._pool.acquire(credential, fresh=True)
                task = SpeechTask(connection, parameters, order.usage, self._silence_seconds, order.timeline)
                with suppress(ConnectionLost):  # told to whoever reads
                    await task.submit()
            except BaseException:
                self._pool.discard(connection)
                raise
        return task

    def _cancel(self, task: SpeechTask) -> None:
        cancelling = asyncio.create_task(task.cancel())
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    def _leave(self, task: SpeechTask) -> None:
        task.note_end()
        if task.finished:
            self._pool.release(task.connection)
        else:
            self._pool.discard(task.connection)
