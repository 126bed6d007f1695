"""Connections that do not come up: nothing was accepted, so asking again is harmless where it can help."""

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from app.dashscope import ConnectionPool
from app.errors import AppError, ConnectionLost, HandshakeTimeout, InvalidApiKey, Throttled, UpstreamError
from tests.dashscope.provider import AUDIO, Provider, Refusal, speaks
from tests.dashscope.speaker import Speaker

REFUSED_KEY = '{"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "req-1"}'
UNPAID = '{"code": "Arrearage", "message": "Access denied, please make sure your account is in good standing."}'


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (Refusal(401, REFUSED_KEY), InvalidApiKey),
        (Refusal(401), InvalidApiKey),
        (Refusal(403), InvalidApiKey),
        (Refusal(403, "<html>forbidden</html>"), InvalidApiKey),
        (Refusal(403, '["forbidden"]'), InvalidApiKey),
        (Refusal(403, UNPAID), UpstreamError),
        (Refusal(400, '{"code": 7, "message": null}'), UpstreamError),
        (Refusal(404), UpstreamError),
        (Refusal(429, UNPAID), UpstreamError),
    ],
)
async def test_a_final_refusal_is_told_at_once(
    provider: Provider, speaker: Speaker, refusal: Refusal, error: type[AppError]
) -> None:
    provider.expect(refusal)
    with pytest.raises(error) as refused:
        await speaker.say()
    assert type(refused.value) is error
    assert len(provider.handshakes) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(429),
        Refusal(429, '{"code": "Throttling.RateQuota", "message": "slow down"}'),
        Refusal(500),
        Refusal(503),
    ],
)
async def test_a_passing_refusal_is_asked_again(provider: Provider, speaker: Speaker, refusal: Refusal) -> None:
    provider.expect(refusal, refusal, speaks())
    assert await speaker.say() == AUDIO
    assert provider.texts == ["你好"]


@pytest.mark.parametrize(("status", "error"), [(429, Throttled), (500, ConnectionLost)])
async def test_a_lasting_refusal_ends_after_a_bounded_number_of_attempts(
    provider: Provider, speaker: Speaker, status: int, error: type[AppError]
) -> None:
    provider.expect(*[Refusal(status)] * 4)
    with pytest.raises(error) as refused:
        await speaker.say()
    assert type(refused.value) is error
    assert len(provider.handshakes) == 4
    assert bool(refused.value.retry_after_seconds) == (error is Throttled)


@pytest.fixture
def nobody_listens() -> Iterator[str]:
    """The address of a port that is taken, but where nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"ws://127.0.0.1:{bound.getsockname()[1]}"


async def test_a_refused_connection_is_lost(speaker: Speaker, nobody_listens: str) -> None:
    unheard = replace(speaker, credential=replace(speaker.credential, ws_url=nobody_listens))
    with pytest.raises(ConnectionLost):
        await unheard.say()


NO_HANDSHAKE = {
    "nothing": b"",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "an answer cut off": b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 50\r\n\r\nhalf",
    "no upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "a wrong proof": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: wrong\r\n\r\n",
}


@pytest.mark.parametrize("answer", NO_HANDSHAKE.values(), ids=NO_HANDSHAKE.keys())
async def test_an_answer_that_is_no_handshake_is_a_lost_connection(speaker: Speaker, answer: bytes) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1")
    async with server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(ConnectionLost):
            await replace(speaker, credential=replace(speaker.credential, ws_url=f"ws://{host}:{port}")).say()


async def test_a_handshake_without_an_answer_times_out(provider: Provider, speaker: Speaker) -> None:
    provider.expect(*[Refusal(None)] * 4)
    with pytest.raises(HandshakeTimeout):
        await replace(speaker, pool=ConnectionPool(handshake_seconds=0.1)).say()
    assert len(provider.handshakes) == 4


async def test_a_handshake_that_recovers_is_not_noticed(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Refusal(None), speaks())
    hasty = replace(speaker, pool=ConnectionPool(handshake_seconds=0.5))
    assert await hasty.say() == AUDIO
    await hasty.pool.close()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed_so_the_key_does_not_travel(
    provider: Provider, other_provider: Provider, speaker: Speaker, status: int
) -> None:
    provider.expect(Refusal(status, location=other_provider.url))
    with pytest.raises(UpstreamError):
        await speaker.say()
    assert other_provider.handshakes == []
    assert len(provider.handshakes) == 1


async def test_verifying_tells_a_bad_key_from_a_bad_line(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Refusal(401, REFUSED_KEY), Refusal(500))
    with pytest.raises(InvalidApiKey):
        await speaker.verify()
    with pytest.raises(ConnectionLost):
        await speaker.verify()


async def test_verifying_does_not_trust_an_older_connection(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks(), Refusal(401))
    await speaker.say()
    with pytest.raises(InvalidApiKey):
        await speaker.verify()


async def test_a_refusal_does_not_show_the_key(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Refusal(400, '{"code": "Odd", "message": "Authorization: Bearer sk-test-1 is odd"}'))
    with pytest.raises(UpstreamError) as refused:
        await speaker.say()
    assert "sk-test" not in refused.value.message
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__
