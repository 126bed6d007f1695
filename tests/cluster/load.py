"""Users who have things spoken, again and again: streams, live sessions, plain calls and long texts."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from app.security import TokenSigner
from tests.cluster.calls import Answer, Listening, call
from tests.cluster.topology import JWT_SECRET, Cluster, new_api_key
from tests.narrating import padded

MODEL, VOICE = "cosyvoice-v3-flash", "longanyang"
SYNTHESIZE = "/api/audio/tts/synthesize"
NARRATE = "/api/audio/tts/synthesize-long"
LIVE = "/api/audio/tts/stream"

# Few enough for the sandbox to remember how they sound, so that it makes no more audio than it must: each counts 19
# characters and plays for about two seconds.
_words = random.Random(5)
SENTENCES = tuple(f"{''.join(_words.sample('春夏秋冬东南西北山水风云花鸟鱼虫日月', 9))}。" for _ in range(16))
# Samples need no work of the sandbox, and at 8000 a second few messages: most streams are such. The rest are what
# clients ask for by default.
FORMATS = (("pcm", 8000), ("wav", 8000), ("pcm", 8000), ("mp3", 22050))

PAUSE_AFTER_FAILURE_SECONDS = 0.5
REPEATING_SECONDS = 75.0
POLL_SECONDS = 1.0
NARRATION_SECONDS = 180.0


@dataclass
class User:
    """Somebody with an API key of his own, who says everything only once."""

    id: uuid.UUID
    api_key: str
    token: str
    number: int
    said: set[str] = field(default_factory=set)

    @property
    def headers(self) -> dict[str, str]:
        """What logs him in."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def sound(self) -> tuple[str, int]:
        """His format and sample rate."""
        return FORMATS[self.number % len(FORMATS)]

    def new_text(self, sentences: int) -> str:
        """Something to say."""
        while (text := "".join(random.sample(SENTENCES, sentences))) in self.said:
            pass
        self.said.add(text)
        return text

    def order(self, text: str, **fields: Any) -> dict[str, Any]:
        """The body of a request."""
        audio_format, rate = self.sound
        asked = {"model": MODEL, "voice": VOICE, "text": text, "format": audio_format, "sample_rate": rate}
        return {**asked, **fields}


@dataclass
class Outcome:
    """What became of a request; times are by the clock."""

    user: User
    kind: str
    text: str
    request_id: str
    began: float
    ended: float = 0.0
    heard_after: float | None = None
    status: int = 0
    error: str = ""
    is_whole: bool = False
    is_repeat: bool = False
    record_id: int | None = None
    audio_url: str | None = None
    size: int = 0
    digest: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the client got all that he wanted."""
        return self.status == 200 and self.is_whole

    @property
    def brief(self) -> str:
        """In a few words."""
        if self.succeeded:
            return "ok"
        if not self.status:
            return f"no answer {self.error}".strip()
        return f"{self.status} {self.error}".strip() if self.is_whole else f"{self.status} broken off"


async def create_users(cluster: Cluster, number: int) -> list[User]:
    """Make users who never log in: to hash their passwords would take longer than their calls."""
    signer = TokenSigner((JWT_SECRET,), 3600)
    logins = {uuid.uuid4(): uuid.uuid4() for _ in range(number)}
    users = [
        User(user_id, new_api_key(), signer.issue(user_id, login_id), place)
        for place, (user_id, login_id) in enumerate(logins.items())
    ]
    ids, names = [user.id for user in users], [f"user-{user.number}" for user in users]
    await cluster.rows(
        "INSERT INTO users (id, username, username_key, password_hash, is_active, created_at)"
        " SELECT id, name, name, '-', true, $3 FROM unnest($1::uuid[], $2::text[]) AS made (id, name)",
        ids,
        names,
        datetime.now(UTC),
    )
    await cluster.rows(
        "INSERT INTO logins (id, user_id, generation, created_at, refreshed_at, expires_at)"
        " SELECT id, user_id, 0, now(), now(), now() + interval '1 day'"
        " FROM unnest($1::uuid[], $2::uuid[]) AS made (id, user_id)",
        list(logins.values()),
        list(logins),
    )
    turn = asyncio.Semaphore(8)

    async def store_key(user: User) -> None:
        async with turn:
            body = {"api_key": user.api_key}
            answer = await call(cluster.proxy.port, "PUT", "/api/user/apikey", user.headers, body)
            assert answer.status == 200, answer.body

    await asyncio.gather(*map(store_key, users))
    return users


Way = Callable[[User], Awaitable[None]]


class Load:
    """Everything that is asked of a cluster, and what came of it."""

    def __init__(self, cluster: Cluster, sentences: int) -> None:
        self._port = cluster.proxy.port
        self._sentences = sentences
        self._stops_at = 0.0
        self._users: dict[str, list[User]] = {}
        self.listening = Listening()
        self.outcomes: list[Outcome] = []
        self.texts: dict[int, Outcome] = {}

    @property
    def users(self) -> list[User]:
        """Everybody who asks."""
        return [user for users in self._users.values() for user in users]

    def engage(self, kind: str, users: list[User]) -> None:
        """Have users ask for something: `stream`, `named`, `live` or `plain`."""
        self._users[kind] = users

    async def run(self, seconds: float, ramp_seconds: float) -> None:
        """Ask for so long; everybody begins within the ramp, and hears what he asked for to its end."""
        self._stops_at = time.monotonic() + seconds
        ways: dict[str, Way] = {"stream": self._stream, "named": self._name, "live": self._talk, "plain": self._plain}
        waits = [(ways[kind], user) for kind, users in self._users.items() if kind in ways for user in users]
        random.shuffle(waits)
        pause = ramp_seconds / max(1, len(waits))
        await asyncio.gather(*(self._repeat(way, user, place * pause) for place, (way, user) in enumerate(waits)))

    async def narrate(self, user: User, segments: int) -> Outcome:
        """Have a long text spoken in the background, and wait for its end."""
        narrated = self._users.setdefault("long", [])
        narrated.append(user)
        text = padded(segments, first=segments * len(narrated))
        body = user.order(text, **{"async": True, "format": "mp3", "sample_rate": 22050})
        outcome, answer = await self._ask(user, "long", text, NARRATE, body)
        if answer.status != 200:
            return outcome
        outcome.record_id = answer.data["record_id"]
        self.texts[answer.data["record_id"]] = outcome
        deadline = time.monotonic() + NARRATION_SECONDS
        outcome.is_whole = False
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            path = f"/api/audio/records/{outcome.record_id}"
            _, answer = await self._ask(user, "poll", "", path, None)
            if answer.status == 200 and answer.data["status"] != "running":
                outcome.is_whole = answer.data["status"] == "succeeded"
                outcome.error = answer.data["status"]
                outcome.audio_url = answer.data.get("output_url")
                break
        outcome.ended = time.time()
        return outcome

    async def _repeat(self, way: Way, user: User, wait_seconds: float) -> None:
        await asyncio.sleep(wait_seconds)
        while time.monotonic() < self._stops_at:
            before = len(self.outcomes)
            await way(user)
            if not all(each.succeeded for each in self.outcomes[before:] if each.user is user):
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    async def _ask(
        self,
        user: User,
        kind: str,
        text: str,
        path: str,
        body: dict[str, Any] | None,
        listening: Listening | None = None,
        **headers: str,
    ) -> tuple[Outcome, Answer]:
        outcome = Outcome(user, kind, text, uuid.uuid4().hex, time.time())
        named = {**user.headers, "X-Request-Id": outcome.request_id, **headers}
        answer = await call(self._port, "GET" if body is None else "POST", path, named, body, listening)
        outcome.ended = time.time()
        outcome.status, outcome.is_whole, outcome.error = answer.status, answer.is_whole, answer.error
        outcome.is_repeat = "idempotency-replayed" in answer.headers
        outcome.size, outcome.digest = answer.size, answer.digest
        if answer.size:
            outcome.heard_after = answer.heard_at - outcome.began
        if record_id := answer.headers.get("x-record-id"):
            outcome.record_id = int(record_id)
        self.outcomes.append(outcome)
        return outcome, answer

    async def _stream(self, user: User) -> None:
        text = user.new_text(self._sentences)
        await self._ask(user, "stream", text, SYNTHESIZE, user.order(text, stream=True), self.listening)

    async def _name(self, user: User) -> None:
        """A stream with an Idempotency-Key, asked for again until it is there, or its end is told."""
        text, key = user.new_text(self._sentences), str(uuid.uuid4())
        deadline = time.monotonic() + REPEATING_SECONDS
        while time.monotonic() < deadline:
            order = user.order(text, stream=True)
            outcome, _ = await self._ask(
                user, "named", text, SYNTHESIZE, order, self.listening, **{"Idempotency-Key": key}
            )
            if outcome.succeeded or outcome.is_repeat:
                return
            await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    async def _plain(self, user: User) -> None:
        text = user.new_text(2)
        outcome, answer = await self._ask(user, "plain", text, SYNTHESIZE, user.order(text))
        if outcome.succeeded:
            outcome.record_id, outcome.audio_url = answer.data["record_id"], answer.data["audio_url"]

    async def _talk(self, user: User) -> None:
        """A live session of two utterances; its token is among the subprotocols, as browsers may have it."""
        audio_format, rate = user.sound
        asked = {"model": MODEL, "voice": VOICE, "format": audio_format, "sample_rate": rate}
        outcome = Outcome(user, "live", "", uuid.uuid4().hex, time.time())
        url = f"ws://127.0.0.1:{self._port}{LIVE}?{urlencode(asked)}"
        try:
            async with connect(
                url,
                additional_headers={"X-Request-Id": outcome.request_id},
                subprotocols=[Subprotocol("bearer"), Subprotocol(user.token)],
                compression=None,
                proxy=None,
                close_timeout=5,
                ping_interval=None,
            ) as socket:
                for _ in range(2):
                    text = user.new_text(self._sentences)
                    outcome = Outcome(user, "live", text, outcome.request_id, time.time())
                    await socket.send(json.dumps({"type": "text", "content": text}))
                    await socket.send(json.dumps({"type": "end"}))
                    await self._hear(socket, outcome)
                    self._note(outcome)
                    if not outcome.succeeded:
                        return
        except (OSError, EOFError, TimeoutError, WebSocketException) as error:
            outcome = Outcome(user, "live", outcome.text, outcome.request_id, outcome.began)
            if isinstance(error, InvalidStatus):
                outcome.status, outcome.is_whole = error.response.status_code, True
            elif isinstance(error, ConnectionClosed) and error.rcvd:
                outcome.error = str(error.rcvd.code)
            self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        outcome.ended = time.time()
        self.outcomes.append(outcome)

    async def _hear(self, socket: Any, outcome: Outcome) -> None:
        is_heard = False
        try:
            while isinstance(frame := await socket.recv(), bytes):
                if not is_heard:
                    is_heard = True
                    self.listening.begin()
                    outcome.heard_after = time.time() - outcome.began
                outcome.size += len(frame)
        finally:
            if is_heard:
                self.listening.end()
        message = json.loads(frame)
        outcome.status = 200 if message["type"] == "complete" else message["code"]
        outcome.error = message.get("error", "")
        outcome.is_whole = True
        outcome.record_id, outcome.audio_url = message.get("record_id"), message.get("audio_url")
