"""Connections that send too much, too slowly, or what is no HTTP: each is bounded, and hinders nobody else."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from app import serving
from tests.conftest import Account
from tests.servers import Server, free_port

PATIENCE_SECONDS = 10.0
MEGABYTE = 1024 * 1024
GET = b"GET /echo HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADE = (
    b"GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Application:
    """Tells what it was asked; some paths answer at once and some never."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.left = threading.Semaphore(0)
        self.messages = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self._converse(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        size, whole = 0, scope["path"] == "/unread"
        while not whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.release()
                return
            size += len(message["body"])
            whole = not message["more_body"]
        if scope["path"] == "/forever":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.release()
            return
        told = {"path": scope["path"], "size": size, "headers": [name.decode() for name, _ in scope["headers"]]}
        self.heard.append(told)
        body = json.dumps(told).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _converse(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            self.messages += 1
        self.left.release()


@contextmanager
def running(application: Application) -> Iterator[int]:
    """The product's way of serving, with another application; gives the port."""
    port = free_port()
    options = uvicorn.Config(
        application, port=port, log_config=None, access_log=False, lifespan="off", **serving.SERVER
    )
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[int, Application]]:
    application = Application()
    with running(application) as port:
        yield port, application


@pytest.fixture
def port(served: tuple[int, Application]) -> int:
    return served[0]


@pytest.fixture
def application(served: tuple[int, Application]) -> Application:
    """What is behind the port, with nobody having left it yet."""
    served[1].left = threading.Semaphore(0)
    return served[1]


class Peer:
    """One who speaks to a server as he likes."""

    def __init__(self, port: int, said: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        self.say(said)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, said: bytes) -> None:
        self.socket.sendall(said)

    def repeat(self, piece: bytes, most: int = 64 * MEGABYTE) -> int:
        """Say something over and over until nobody takes it any more; gives how many bytes were taken."""
        block, taken = piece * max(1, 65536 // len(piece)), 0
        with suppress(ConnectionError):
            while taken < most:
                taken += self.socket.send(block)
        return taken

    def hear(self) -> bytes:
        """Everything up to the end of the connection."""
        heard = b""
        with suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                heard += piece
        return heard

    def hear_one(self) -> bytes:
        """One answer, whose connection goes on."""
        heard = b""
        while b"\r\n\r\n" not in heard:
            piece = self.socket.recv(65536)
            assert piece, heard
            heard += piece
        head, _, body = heard.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += self.socket.recv(65536)
        return head + b"\r\n\r\n" + body


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and name of a refusal, which must be complete and the last."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    status = int(lines[0].split()[1])
    told = json.loads(body)
    assert b"connection: close" in lines
    assert any(line.startswith(b"x-request-id: ") and len(line) > 30 for line in lines)
    assert f"content-length: {len(body)}".encode() in lines
    assert (told["code"], told["data"]) == (status, None)
    assert set(told) == {"code", "message", "data", "error"}
    return status, told["error"]


def is_served(port: int) -> bool:
    """Whether an honest client gets his answer at once."""
    started = time.monotonic()
    with Peer(port, GET + b"Connection: close\r\n\r\n") as peer:
        return peer.hear().startswith(b"HTTP/1.1 200") and time.monotonic() - started < PATIENCE_SECONDS / 2


# ---- Too much


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"GET /", b"a"),
        (b"GET /echo?", b"%41"),
        (GET + b"X: ", b"a"),
        (GET + b"X", b"a"),
        (GET + b"X: ", b"\t"),
        (GET, b"X: y\r\n"),
        (GET, b":\r\n"),
        (GET, b"Cookie: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n"),
        (b"", b"\r\n"),
        (UPGRADE + b"X: ", b"a"),
        (UPGRADE, b"X: y\r\n"),
        (CHUNKED + b"5;", b"a"),
        (CHUNKED + b"5;a=", b"a"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"X: y\r\n"),
        (CHUNKED + b"5\r\nhello\r\n0\r\nX: ", b"a"),
        (CHUNKED, b"0"),
    ],
    ids=lambda said: said[-24:].decode().replace("\r\n", "|"),
)
def test_what_never_ends_is_not_kept(application: Application, port: int, beginning: bytes, piece: bytes) -> None:
    with Peer(port, beginning) as peer:
        taken = peer.repeat(piece)
        peer.hear()
    assert taken < 32 * MEGABYTE  # which the kernel took: the buffers of both sides
    assert is_served(port)


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X: " + b"a" * serving.MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /" + b"a" * serving.MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        GET + b"X: y\r\n" * serving.MAX_HEADERS + b"\r\n",
        UPGRADE + b"X: y\r\n" * serving.MAX_HEADERS + b"\r\n",
    ],
    ids=["long header", "long address", "many headers", "many headers of a WebSocket"],
)
def test_a_large_head_is_refused_in_the_envelope(application: Application, port: int, head: bytes) -> None:
    heard = len(application.heard)
    with Peer(port, head) as peer:
        assert refusal(peer.hear()) == (431, "HEAD_TOO_LARGE")
    assert len(application.heard) == heard


def test_a_head_within_the_limits_is_taken(port: int) -> None:
    head = GET + b"Y: " + b"a" * (serving.MAX_HEAD_BYTES - 4096) + b"\r\n"
    with Peer(port) as peer:
        for part in (head[:10], head[10:50_000], head[50_000:], b"X: y\r\n" * (serving.MAX_HEADERS - 2), b"\r\n"):
            peer.say(part)
            time.sleep(0.01)
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
        peer.say(head + b"\r\n")
        assert peer.hear_one().startswith(b"HTTP/1.1 200")


def test_a_strange_handshake_of_a_websocket_is_refused(port: int) -> None:
    for strange in (b"X: " + b"a" * 20_000 + b"\r\n\r\n", b"Content-Length: 10\r\n\r\n"):
        with Peer(port, UPGRADE + strange) as peer:
            assert refusal(peer.hear()) == (400, "INVALID_REQUEST")


def test_trailers_are_no_headers(port: int) -> None:
    with Peer(port, CHUNKED + b"5\r\nhello\r\n0\r\nAuthorization: Bearer x\r\nHost: y\r\n\r\n") as peer:
        told = json.loads(peer.hear_one().partition(b"\r\n\r\n")[2])
        assert told == {"path": "/echo", "size": 5, "headers": ["host", "transfer-encoding"]}
        peer.say(GET + b"\r\n")
        assert peer.hear_one().startswith(b"HTTP/1.1 200")


# ---- Too slowly


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(serving, "REST_SECONDS", 0.3)


@pytest.mark.usefixtures("hurried")
def test_a_head_is_waited_for_a_while_only(port: int) -> None:
    slow = [Peer(port, head) for head in (b"G", b"GET /echo HTTP/1.1\r\n", GET, GET + b"X: y") for _ in range(50)]
    assert is_served(port)
    for peer in slow:
        with peer:
            assert refusal(peer.hear()) == (408, "REQUEST_TIMEOUT")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("piece", [b"X: y\r\n", b"\r\n"])
def test_a_head_that_drips_is_given_up(port: int, piece: bytes) -> None:
    with Peer(port, b"\r\n" if piece == b"\r\n" else GET) as peer:
        peer.socket.settimeout(0.05)
        answer = b""
        for _ in range(100):
            with suppress(ConnectionError):
                peer.socket.send(piece)
            try:
                if answer := peer.socket.recv(65536):
                    break
            except TimeoutError:
                continue
        assert refusal(answer) == (408, "REQUEST_TIMEOUT")


@pytest.mark.usefixtures("hurried")
def test_who_says_nothing_is_left_without_a_word(port: int) -> None:
    with Peer(port) as peer:
        assert peer.hear() == b""
    with Peer(port, GET + b"\r\n") as peer:
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
        peer.say(b"\r\n")  # which is not what uvicorn's own clock waits for
        assert refusal(peer.hear()) == (408, "REQUEST_TIMEOUT")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "said",
    [
        POST + b"Content-Length: 10\r\n\r\n",
        POST + b"Content-Length: 10\r\n\r\n12345",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\nX: y",
    ],
)
def test_a_body_that_stalls_is_given_up(application: Application, port: int, said: bytes) -> None:
    with Peer(port, said) as peer:
        assert refusal(peer.hear()) == (408, "REQUEST_TIMEOUT")
    assert application.left.acquire(timeout=PATIENCE_SECONDS)


def test_a_body_that_drips_is_given_up(application: Application, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.3)
    with Peer(port, CHUNKED) as peer:
        peer.socket.settimeout(0.02)
        answer = b""
        for _ in range(500):
            with suppress(ConnectionError):
                peer.socket.send(b"1;extension\r\na\r\n")
            try:
                if answer := peer.socket.recv(65536):
                    break
            except TimeoutError:
                continue
        assert refusal(answer) == (408, "REQUEST_TIMEOUT")
    assert application.left.acquire(timeout=PATIENCE_SECONDS)


def test_a_body_that_is_slow_but_comes_is_taken(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(serving, "BODY_BYTES", 10)
    with Peer(port, POST + b"Content-Length: 300\r\n\r\n") as peer:
        for _ in range(30):
            peer.say(b"0123456789")
            time.sleep(0.05)
        assert b'"size": 300' in peer.hear_one()


@pytest.mark.usefixtures("hurried")
def test_an_answer_may_take_as_long_as_it_likes(application: Application, port: int) -> None:
    with Peer(port, POST.replace(b"echo", b"forever") + b"Content-Length: 2\r\n\r\nhi") as peer:
        peer.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):
            peer.socket.recv(1)
    assert application.left.acquire(timeout=PATIENCE_SECONDS)


@pytest.mark.usefixtures("hurried")
def test_an_early_answer_is_heard_and_the_rest_is_not_read_forever(port: int) -> None:
    head = POST.replace(b"echo", b"unread") + b"Content-Length: 100000000\r\n\r\n"
    with Peer(port, head + b"a" * 1000) as peer:
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
        assert peer.hear() == b""
    with Peer(port, POST.replace(b"echo", b"unread") + b"Content-Length: 10\r\n\r\n") as peer:
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
        peer.say(b"0123456789" + GET + b"\r\n")
        assert peer.hear_one().startswith(b"HTTP/1.1 200")


def test_who_sends_all_before_he_listens_hears_the_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REST_SECONDS", 0.5)
    monkeypatch.setattr(serving, "BODY_BYTES", 10)
    head = POST.replace(b"echo", b"unread")
    with Peer(port, head + b"Content-Length: 300\r\n\r\n") as peer:
        for _ in range(30):
            peer.say(b"0123456789")
            time.sleep(0.05)
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
        peer.say(GET + b"\r\n")
        assert peer.hear_one().startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(serving, "MAX_REST_BYTES", 1000)
    with Peer(port, head + b"Content-Length: 1000000000000\r\n\r\n") as peer:
        started = time.monotonic()
        peer.repeat(b"a" * 1000, most=1_000_000_000_000)
        assert time.monotonic() - started < serving.MAX_REST_SECONDS / 2


# ---- What is no HTTP, or two requests in one


@pytest.mark.parametrize(
    "said",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        POST + b"Content-Length: 5, 5\r\n\r\nhello",
        POST + b"Content-Length: -5\r\n\r\nhello",
        POST + b"Content-Length: +5\r\n\r\nhello",
        POST + b"Content-Length: 0x5\r\n\r\nhello",
        POST + b"Content-Length: 5 5\r\n\r\nhello",
        POST + b"Content-Length: five\r\n\r\nhello",
        POST + b"Content-Length: \r\n\r\nhello",
        POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nhello",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhello",
        POST + b"Content-Length : 5\r\n\r\nhello",
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        CHUNKED + b"-1\r\nhello\r\n",
        CHUNKED + b"0x5\r\nhello\r\n",
        CHUNKED + b"fffffffffffffffff\r\nhello\r\n",
        CHUNKED + b"5\r\nhelloX",
        CHUNKED + b"5\nhello\n0\n\n",
        CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n",
        GET + b"X: a\0b\r\n\r\n",
        GET + b"X: a\rb\r\n\r\n",
        GET + b"X: a\nGET /two HTTP/1.1\r\n\r\n",
        GET + b" folded: y\r\n\r\n",
        GET + b"X Y: z\r\n\r\n",
        GET + b": z\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET /\x80\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /echo HTTP/2.0\r\n\r\n",
        b"GET /echo HTTP/0.9\r\n\r\n",
        b"GET /echo HTTP/1.1.1\r\n\r\n",
        b"GET /echo FTP/1.1\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 100,
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
    ids=lambda said: repr(said.removeprefix(POST).removeprefix(b"GET ")[:40]),
)
def test_what_could_be_read_in_two_ways_is_refused(application: Application, port: int, said: bytes) -> None:
    heard = len(application.heard)
    with Peer(port, said) as peer:
        assert refusal(peer.hear()) == (400, "INVALID_REQUEST")
    assert len(application.heard) == heard


def test_one_connection_may_ask_for_several_things(application: Application, port: int) -> None:
    with Peer(port, (GET + b"\r\n") * 8) as peer:
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 8 or not answers.endswith(b"}"):
            answers += peer.socket.recv(65536)


@pytest.mark.parametrize("said", [GET + b"\r\n", POST + b"Content-Length: 100000\r\n\r\n" + b"a" * 100_000])
def test_requests_do_not_pile_up_behind_one_that_takes_long(application: Application, port: int, said: bytes) -> None:
    heard = len(application.heard)
    forever = GET.replace(b"echo", b"forever") + b"\r\n"
    with Peer(port, forever) as peer:
        taken = peer.repeat(said)
        assert peer.hear() == b""  # an answer would pass for that of the first
    assert taken < 32 * MEGABYTE
    assert application.left.acquire(timeout=PATIENCE_SECONDS)
    assert len(application.heard) == heard


def test_who_asked_first_is_seen_to_leave_though_others_came_behind(application: Application, port: int) -> None:
    with Peer(port, GET.replace(b"echo", b"forever") + b"\r\n") as peer:
        time.sleep(0.1)
        peer.say(GET + b"\r\n")
        time.sleep(0.1)
    assert application.left.acquire(timeout=PATIENCE_SECONDS)


def test_old_clients_are_answered_and_left(port: int) -> None:
    with Peer(port, b"GET /echo HTTP/1.0\r\n\r\n") as peer:
        assert peer.hear().startswith(b"HTTP/1.1 200")
    with Peer(port, b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2) as peer:
        assert peer.hear().count(b"HTTP/1.1 200") == 1


def test_other_protocols_are_not_changed_to(port: int) -> None:
    with Peer(port, GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n") as peer:
        assert peer.hear_one().startswith(b"HTTP/1.1 200")


# ---- WebSockets


def frame(opcode: int, content: bytes = b"", *, is_last: bool = True, length: int | None = None) -> bytes:
    """A frame of a client, whose mask is zero."""
    size = len(content) if length is None else length
    lengths = (
        bytes([0x80 | size])
        if size < 126
        else b"\xfe" + size.to_bytes(2)
        if size < 65536
        else b"\xff" + size.to_bytes(8)
    )
    return bytes([is_last << 7 | opcode]) + lengths + bytes(4) + content


TEXT, CONTINUED, PING = 1, 0, 9


def close_code(heard: bytes) -> int:
    """What the last frame of a server says."""
    place = heard.rindex(b"\x88", max(0, len(heard) - 127))
    return int.from_bytes(heard[place + 2 : place + 4])


@pytest.fixture
def conversing(port: int) -> Iterator[Peer]:
    with Peer(port, UPGRADE + b"\r\n") as peer:
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += peer.socket.recv(65536)
        assert answer.startswith(b"HTTP/1.1 101")
        yield peer


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frame(TEXT, length=serving.SERVER["ws_max_size"] + 1), 1009),
        (frame(TEXT, length=2**62), 1009),
        (frame(TEXT, b"a" * 2**21, is_last=False) + frame(CONTINUED, b"a" * (2**21 + 1)), 1009),
        (frame(TEXT, is_last=False) + frame(CONTINUED, is_last=False) * (serving.MAX_FRAGMENTS + 9), 1009),
        (frame(TEXT, is_last=False) + frame(CONTINUED, b"a", is_last=False) * (serving.MAX_FRAGMENTS + 9), 1009),
        (frame(PING) * (serving.MAX_PINGS_PER_SECOND + 1), 1008),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (frame(3, b"x"), 1002),
        (frame(CONTINUED, b"x"), 1002),
        (frame(PING, b"a" * 126), 1002),
        (frame(TEXT)[:1] + b"\x01x", 1002),
        (b"\xf1" + frame(TEXT)[1:], 1002),
    ],
    ids=[
        "long",
        "endless",
        "long in parts",
        "nothing in parts",
        "letters in parts",
        "pings",
        "no text",
        "unknown",
        "without beginning",
        "long ping",
        "unmasked",
        "reserved bits",
    ],
)
def test_hostile_frames_end_the_conversation(
    application: Application, port: int, conversing: Peer, said: bytes, code: int
) -> None:
    conversing.say(said)
    assert close_code(conversing.hear()) == code
    assert application.left.acquire(timeout=PATIENCE_SECONDS)
    assert is_served(port)


def test_pongs_that_nobody_reads_are_not_kept(
    application: Application, conversing: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_PINGS_PER_SECOND", 10**9)
    buffered: list[int] = []
    write_buffer = serving.BoundedWebSocket.handle_ping

    def handle_ping(protocol: serving.BoundedWebSocket) -> None:
        write_buffer(protocol)
        buffered.append(protocol.transport.get_write_buffer_size())

    monkeypatch.setattr(serving.BoundedWebSocket, "handle_ping", handle_ping)
    conversing.repeat(frame(PING, b"a" * 125), 6 * MEGABYTE)
    assert len(buffered) > 10_000
    assert max(buffered) < 2 * MEGABYTE
    conversing.socket.close()
    assert application.left.acquire(timeout=PATIENCE_SECONDS)


def test_messages_in_parts_are_put_together(application: Application, conversing: Peer) -> None:
    messages = application.messages
    conversing.say(frame(TEXT, b"a", is_last=False) + frame(CONTINUED, b"b", is_last=False) * 500)
    conversing.say(frame(PING) + frame(CONTINUED, b"c") + frame(8))
    assert application.left.acquire(timeout=PATIENCE_SECONDS)
    assert application.messages == messages + 1


# ---- The product itself


async def test_the_product_is_served_like_this(backend: Server, account: Account) -> None:
    port = int(backend.url.rpartition(":")[2])

    def attack() -> tuple[int, str]:
        with Peer(port, b"GET /health/live HTTP/1.1\r\nX: " + b"a" * serving.MAX_HEAD_BYTES + b"\r\n\r\n") as peer:
            return refusal(peer.hear())

    assert await asyncio.to_thread(attack) == (431, "HEAD_TOO_LARGE")
    assert (await account.client.get("/api/user/me")).status_code == 200
