"""What one process tells the others that share its PostgreSQL database, so that none of them has to look all the time.

Words may be lost: when a connection breaks, when too many wait. So whoever listens also looks from time to time, and is
told to look whenever a connection is made anew.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
from sqlalchemy import make_url

CHANNEL = "ai_voice_backend"
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0
# How long a connection may be silent before it is asked whether it lives.
SILENCE_SECONDS = 15.0
LONGEST_PAUSE_SECONDS = 15.0
MAX_WAITING = 1000

log = structlog.get_logger(__name__)
Hear = Callable[[str], object]


class Announcements:
    """Short words about a topic. On SQLite nobody hears them: its processes look."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._is_heard = self._url.get_backend_name() == "postgresql"
        self._listeners: defaultdict[str, list[Hear]] = defaultdict(list)
        self._waiting: dict[str, None] = {}
        self._has_words = asyncio.Event()

    def hear(self, topic: str, listener: Hear) -> None:
        """Call `listener` with every word about a topic, of this process too; with an empty one after a gap."""
        self._listeners[topic].append(listener)

    def announce(self, topic: str, word: str = "") -> None:
        """Tell everybody, soon. Nothing is told while the connection is gone."""
        if self._is_heard and len(self._waiting) < MAX_WAITING:
            self._waiting[f"{topic} {word}"] = None
            self._has_words.set()

    async def run(self) -> None:
        """Until cancelled: pass words on. It ends by itself where nobody would hear them."""
        if not self._is_heard:
            return
        import asyncpg  # here, so that who has no PostgreSQL does not pay for loading it

        failures = 0
        while True:
            try:
                connection = await asyncpg.connect(**self._address(), timeout=CONNECT_SECONDS)
                try:
                    failures = 0
                    await self._pass_on(connection)
                finally:
                    connection.terminate()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                if not failures:
                    log.warning("announcements_interrupted", error=type(error).__name__)
                failures += 1
            self._waiting.clear()
            await asyncio.sleep(min(0.5 * 2**failures, LONGEST_PAUSE_SECONDS))

    async def _pass_on(self, connection: Any) -> None:
        """Hear and tell. Raises what the connection broke with."""
        connection.add_termination_listener(lambda _: self._has_words.set())
        await connection.add_listener(CHANNEL, self._tell)
        for listeners in self._listeners.values():
            for listener in listeners:
                listener("")
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENCE_SECONDS):
                    await self._has_words.wait()
            self._has_words.clear()
            words, self._waiting = list(self._waiting), {}
            await connection.execute(
                "SELECT pg_notify($1, word) FROM unnest($2::text[]) AS word", CHANNEL, words, timeout=ANSWER_SECONDS
            )

    def _tell(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        topic, _, word = str(payload).partition(" ")
        for listener in self._listeners.get(topic, ()):
            listener(word)

    def _address(self) -> dict[str, Any]:
        """The database's address as the driver takes it."""
        _, options = self._url.get_dialect()().create_connect_args(self._url)
        return {name: value for name, value in options.items() if not name.startswith("prepared_statement_")}
