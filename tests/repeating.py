"""Requests under a name of their own, on every route that takes one."""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx

from tests.cloning import CREATE, FLASH, PUBLIC_SAMPLE
from tests.conftest import Account
from tests.databases import rows
from tests.hearing import FILETRANS, PATIENCE_SECONDS, PUBLIC_URL, RECOGNITION, TRANSCRIPTION
from tests.hearing import FLASH as RECOGNIZER
from tests.servers import Sandbox, Server

REPLAYED = "idempotency-replayed"
SENTENCE = "今天天气真好。"
CUSTOMIZATION = "/api/v1/services/audio/tts/customization"


@dataclass(frozen=True, eq=False)
class Order:
    """Something to ask of a route; `kind` is the provider's work for it, and `bought_at` where that is asked for."""

    name: str
    path: str
    body: dict[str, Any]
    kind: str
    bought_at: str | None = None


_SPEECH = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": SENTENCE, "format": "pcm"}
SPEAK = Order("speak", "/api/audio/tts/synthesize", _SPEECH, "speech")
STREAM = Order("stream", SPEAK.path, {**_SPEECH, "stream": True}, "speech")
NARRATE = Order("narrate", "/api/audio/tts/synthesize-long", _SPEECH, "speech")
RECOGNIZE = Order(
    "recognize",
    "/api/audio/asr/recognize",
    {"model": RECOGNIZER, "audio_url": PUBLIC_URL},
    "recognition",
    RECOGNITION,
)
TRANSCRIBE = Order(
    "transcribe",
    "/api/audio/asr/transcribe",
    {"model": FILETRANS, "file_url": PUBLIC_URL},
    "transcription",
    TRANSCRIPTION,
)
CLONE = Order(
    "clone",
    CREATE,
    {"target_model": FLASH, "prefix": "mine", "audio_url": PUBLIC_SAMPLE},
    "enrollment",
    CUSTOMIZATION,
)
ORDERS = (SPEAK, STREAM, NARRATE, RECOGNIZE, TRANSCRIBE, CLONE)
OVER_HTTP = (RECOGNIZE, TRANSCRIBE, CLONE)


def new_key() -> str:
    """A key that nobody has used."""
    return str(uuid.uuid4())


async def ask(account: Account, order: Order, key: str | None, **changes: Any) -> httpx.Response:
    """Ask for something under a key."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return await account.client.post(order.path, json={**order.body, **changes}, headers=headers)


def told(answer: httpx.Response) -> Any:
    """What an answer says: the data, the error, or the bytes of a stream."""
    if not answer.headers["content-type"].startswith("application/json"):
        assert answer.status_code == 200
        return answer.content
    body = answer.json()
    return body["data"] if answer.status_code == 200 else (body["code"], body["error"], body["message"])


def record_of(answer: httpx.Response) -> int:
    """The record of a successful answer."""
    assert answer.status_code == 200, answer.text
    if "x-record-id" in answer.headers:
        return int(answer.headers["x-record-id"])
    record_id: int = answer.json()["data"]["record_id"]
    return record_id


def is_repeat(answer: httpx.Response) -> bool:
    """Whether an answer says that it was given before."""
    assert answer.headers.get(REPLAYED) in {None, "true"}
    return REPLAYED in answer.headers


def bought(sandbox: Sandbox, account: Account, kind: str) -> int:
    """How much work of a kind the provider has accepted from an account."""
    return sum(work["kind"] == kind for work in sandbox.ledger(account.api_key))


def asked_of(sandbox: Sandbox, account: Account, order: Order) -> int:
    """How often the provider was asked for what an order buys, whatever it answered."""
    if order.bought_at is None:
        return len(sandbox.calls(account.api_key))
    requests = [each for each in sandbox.requests(account.api_key) if each["path"] == order.bought_at]
    return sum(each.get("action") in {None, "create_voice"} for each in requests)


def rows_of(server: Server, account: Account) -> list[tuple[int, str, int | None]]:
    """An account's records: id, status, and the quantity of the bill; the oldest first."""
    found = rows(
        server,
        "SELECT records.id, status, quantity FROM records LEFT JOIN bills ON record_id = records.id"
        " WHERE records.user_id = ? ORDER BY records.id",
        uuid.UUID(account.user_id),
    )
    return [(record_id, status, quantity) for record_id, status, quantity in found]


async def under_way(sandbox: Sandbox, account: Account, order: Order) -> None:
    """Wait until the provider works on an order."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not bought(sandbox, account, order.kind):
        assert time.monotonic() < deadline, f"nobody asked to {order.name}"
        await asyncio.sleep(0.03)


async def ended(server: Server, account: Account, number: int = 1) -> list[tuple[int, str, int | None]]:
    """An account's records, once there are so many and all have their ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = rows_of(server, account)
        if len(found) == number and all(status != "running" for _, status, _ in found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
