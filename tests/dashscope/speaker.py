"""The client under test with what a caller keeps beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from app.dashscope import ConnectionPool, Credential, Interruption, SpeechClient, SpeechParameters, SpeechTask, Usage

PARAMETERS = SpeechParameters(model="cosyvoice-v3-flash", voice="longanyang")


@dataclass
class Speaker:
    """A user who has things said with one credential; `usage` and `heard` are those of the last synthesis."""

    pool: ConnectionPool
    credential: Credential
    silence_seconds: float
    usage: Usage = field(default_factory=Usage)
    heard: list[bytes] = field(default_factory=list)
    turns: list[tuple[Credential, str]] = field(default_factory=list)

    @asynccontextmanager
    async def speak(self, text: str = "你好", interruption: Interruption | None = None) -> AsyncIterator[SpeechTask]:
        """A running synthesis."""
        self.usage, self.heard = Usage(), []
        client = SpeechClient(self.pool, self._take_turn, 3, self.silence_seconds)
        async with client.speak(self.credential, PARAMETERS, text, self.usage, interruption=interruption) as task:
            yield task

    async def say(self, text: str = "你好", interruption: Interruption | None = None) -> bytes:
        """The whole audio of a text."""
        async with self.speak(text, interruption) as task:
            async for frame in task.audio():
                self.heard.append(frame)
        return b"".join(self.heard)

    async def verify(self) -> None:
        """Have the key checked."""
        await SpeechClient(self.pool, self._take_turn, 3, self.silence_seconds).verify(self.credential)

    async def _take_turn(self, credential: Credential, model: str) -> None:
        self.turns.append((credential, model))
