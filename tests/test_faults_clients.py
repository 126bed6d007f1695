"""The client is gone: before it is answered, in the middle, and right after."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.auditing import audit
from tests.conftest import Account, CreateAccount
from tests.faults import Scene, saying, until
from tests.hearing import FLASH, RECOGNITION, tone
from tests.narrating import MODEL, PATH, VOICE
from tests.servers import Sandbox, Server, run_backend, run_special_sandbox
from tests.talking import talking

WHOLE = 38
RESET_ON_CLOSE = b"\x01\x00\x00\x00\x00\x00\x00\x00"


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider as fast as it can be."""
    with run_special_sandbox(tmp_path_factory.mktemp("provider")) as running:
        yield running


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, provider: Sandbox) -> Iterator[Server]:
    """The product."""
    with run_backend(tmp_path_factory.mktemp("product"), provider.settings) as running:
        yield running


@pytest.fixture
def scene(product: Server, provider: Sandbox) -> Scene:
    """Both."""
    return Scene(product, provider)


@pytest.fixture
async def caller(product: Server, create_account: CreateAccount) -> Account:
    """A user."""
    return await create_account(product)


def asked(account: Account, route: str, text: str) -> httpx.Request:
    """The request of a route."""
    client = account.client
    speech: dict[str, Any] = {"model": MODEL, "voice": VOICE, "text": text}
    if route == "recognize":
        files = {"file": ("tone.wav", tone(2))}
        return client.build_request("POST", "/api/audio/asr/recognize", data={"model": FLASH}, files=files)
    if route == "long":
        return client.build_request("POST", PATH, json=speech)
    return client.build_request("POST", "/api/audio/tts/synthesize", json={**speech, "stream": route == "stream"})


class Rude:
    """A client that leaves without a word, at any moment."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def send(cls, request: httpx.Request, share: float = 1.0) -> "Rude":
        """Send a request, or only the beginning of its body."""
        reader, writer = await asyncio.open_connection(request.url.host, request.url.port)
        content = await request.aread()
        lines = [
            b"POST " + request.url.raw_path + b" HTTP/1.1",
            *(name + b": " + value for name, value in request.headers.raw),
        ]
        writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + content[: int(len(content) * share)])
        await writer.drain()
        return cls(reader, writer)

    def leave(self) -> None:
        """Be gone, as a process that was killed."""
        handle: socket.socket = self._writer.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._writer.transport.abort()


ROUTES = ["synthesize", "stream", "long", "recognize"]
SLOW = {"path": RECOGNITION, "how": "delay", "seconds": 0.5}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_is_gone_before_all_is_said_ordered_nothing(
    scene: Scene, caller: Account, route: str
) -> None:
    (await Rude.send(asked(caller, route, saying()), share=0.5)).leave()
    found = await audit(scene, caller)
    assert (found.entries, found.ledger) == ([], [])


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_is_gone_at_once_leaves_no_mess(scene: Scene, caller: Account, route: str) -> None:
    (await Rude.send(asked(caller, route, saying()))).leave()
    assert (await caller.synthesize("你好。")).status_code == 200
    found = await audit(scene, caller)
    assert set(found.statuses) <= {"succeeded", "abandoned"}
    assert sum(quantity for quantity, _ in found.bills) == found.counted


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_is_gone_in_the_middle(scene: Scene, caller: Account, route: str) -> None:
    async def is_under_way() -> bool:
        struck = [each for each in scene.sandbox.requests(caller.api_key) if each["fault"]]
        return bool(struck or any(call["text"] for call in scene.sandbox.calls(caller.api_key)))

    with scene.sandbox.faults(hold_tasks=1, requests=[SLOW]):
        client = await Rude.send(asked(caller, route, saying()))
        await until(is_under_way, "nobody asked the provider")
        client.leave()
        if route == "stream":  # nobody else wants it: the provider is told to stop before it said a word
            found = await audit(scene, caller)
            assert (found.statuses, found.bills, found.counted) == (["abandoned"], [(0, False)], 0)
    if route != "stream":
        found = await audit(scene, caller)
        assert (found.statuses, found.bills) == (["succeeded"], [(found.counted, False)])


async def test_a_listener_that_is_gone_in_the_middle_pays_what_was_spoken(scene: Scene, caller: Account) -> None:
    with scene.sandbox.faults(break_tasks=1, break_how="silent", break_after_frames=3):
        client = await Rude.send(asked(caller, "stream", saying(4)))
        await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readexactly(8000)
        client.leave()
        found = await audit(scene, caller)
    assert (found.statuses, found.bills) == (["abandoned"], [(found.counted, False)])
    assert 0 < found.counted < 2 * WHOLE


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_is_gone_before_it_has_read_its_answer(scene: Scene, caller: Account, route: str) -> None:
    client = await Rude.send(asked(caller, route, saying()))
    found = await _once_there_is_one(scene, caller)
    client.leave()
    assert (found.statuses, found.bills) == (["succeeded"], [(found.counted, False)])
    again = await audit(scene, caller)
    assert (again.statuses, again.bills) == (found.statuses, found.bills)


async def _once_there_is_one(scene: Scene, account: Account) -> Any:
    async def is_there() -> bool:
        return bool((await account.history())["items"])

    await until(is_there, "there is no record")
    return await audit(scene, account)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_a_live_client_that_vanishes(scene: Scene, caller: Account, moment: str) -> None:
    with scene.sandbox.faults(
        break_tasks=1, break_how="silent", break_after_frames=3 if moment == "during" else 10_000
    ):
        async with talking(scene.server, caller, format="pcm") as talk:
            if moment == "during":
                await talk.say(saying(4))
                await talk.hear_some()
            elif moment == "after":
                assert (await talk.speak(saying())).message["type"] == "complete"
            talk.vanish()
        found = await audit(scene, caller)
    expected = {"before": [], "during": ["abandoned"], "after": ["succeeded"]}[moment]
    assert found.statuses == expected
    assert found.bills == ([(found.counted, False)] if expected else [])
