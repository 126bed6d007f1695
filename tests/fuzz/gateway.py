"""The HTTP services of a DashScope that answers with anything, in any framing (PROTOCOL §3 to §6)."""

import asyncio
import gzip
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

from tests.fuzz import odd
from tests.fuzz.sockets import read_head

LONG_SECONDS = 2.0  # more than what is waited for an answer
SMUGGLED = "smuggled"
BOMB = gzip.compress(bytes(100_000_000), 9)
STATUSES = (200, 201, 204, 206, 304, 400, 401, 403, 404, 409, 413, 418, 429, 430, 500, 502, 503, 504, 599)
REDIRECTS = (301, 302, 303, 307, 308)
RETRY_AFTERS = ("0", "1", "-1", "x", "9" * 400, "Wed, 21 Oct 2099 07:28:00 GMT", "\xff", "Mon, 99 Foo 0000 99:99:99 X")
_GONE = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)


class HostileGateway:
    """Answers with what fits, with that spoiled, or with what is no answer."""

    def __init__(self, seed: int, trap_url: str) -> None:
        self.tried: Counter[str] = Counter()
        self._chance = Random(f"gateway-{seed}")
        self._trap_url = trap_url
        self._url = ""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve inside the block; gives the base URL."""
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, limit=1 << 20)
        self._url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield f"{self._url}/api/v1"

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(*_GONE, asyncio.CancelledError):  # the last is the end of the run
            while True:
                first, headers = await read_head(reader)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                name, answer = self._answer(first.split()[1], body)
                self.tried[name] += 1
                if not await self._send(name, answer, writer):
                    break
        writer.transport.abort()

    def _answer(self, path: str, body: bytes) -> tuple[str, bytes]:
        chance = self._chance
        good = self._good(path, json.loads(body) if body.startswith(b"{") else {})
        refusal = {"code": chance.choice(odd.CODES), "message": chance.choice(odd.MESSAGES), "request_id": "r"}
        kinds: dict[str, tuple[int, Callable[[], Any]]] = {
            "good": (45, lambda: good),
            "spoiled": (25, lambda: odd.spoil(good, chance)),
            "refusal": (8, lambda: refusal),
            "enveloped refusal": (4, lambda: {"error": refusal}),
            "refusal with work": (3, lambda: {**good, **refusal}),
            "document": (8, lambda: None),
        }
        name = chance.choices(tuple(kinds), tuple(weight for weight, _ in kinds.values()))[0]
        told = kinds[name][1]()
        return name, odd.document(chance) if name == "document" else odd.json_bytes(told)

    def _good(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        chance = self._chance
        base: dict[str, Any] = {"request_id": "r-1"}
        if path.endswith("/generation"):
            message = {"content": [{"text": "你好"}], "annotations": [{"language": "zh", "emotion": "neutral"}]}
            usage = {
                "seconds": 3,
                "input_tokens_details": {"text_tokens": 0},
                "output_tokens_details": {"text_tokens": 6},
            }
            return {**base, "output": {"choices": [{"finish_reason": "stop", "message": message}]}, "usage": usage}
        if path.endswith("/transcription"):
            return {**base, "output": {"task_id": f"task-{chance.randrange(10**9)}", "task_status": "PENDING"}}
        if path.endswith("/customization"):
            voice = {"voice_id": f"cosyvoice-v3-flash-mine-{chance.randrange(10**9)}", "status": "OK"}
            times = {"gmt_create": "2025-01-01 10:00:00", "gmt_modified": "2025-01-01 10:00:00"}
            if asked.get("input", {}).get("action") == "list_voice":
                return {**base, "output": {"voice_list": [{**voice, **times}]}, "usage": {}}
            return {**base, "output": {**voice, **times, "target_model": "cosyvoice-v3-flash"}, "usage": {"count": 1}}
        if path.startswith("/result"):
            sentence = {"begin_time": 0, "end_time": 900, "text": "你好。", "sentence_id": 0, "words": []}
            return {"file_url": "x", "transcripts": [{"channel_id": 0, "text": "你好。", "sentences": [sentence]}]}
        if "/uploads" in path:
            return {**base, "data": {"upload_host": self._url, "upload_dir": "x", "max_file_size_mb": 10}}
        output = {
            "task_id": "t", "task_status": chance.choice(("PENDING", "RUNNING", "SUCCEEDED", "SUCCEEDED", "FAILED")),
            "submit_time": "2025-01-01 10:00:00.1", "end_time": "2025-01-01 10:00:05.1", "code": "", "message": "",
            "result": {"transcription_url": f"{self._url}/result.json"},
        }  # fmt: skip
        return {**base, "output": output, "usage": {"seconds": 4}, "data": [], "total_page": 1}

    async def _send(self, name: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Send an answer; gives whether the connection is still one."""
        chance = self._chance
        status = 200 if name in {"good", "spoiled"} and chance.random() < 0.8 else chance.choice(STATUSES)
        kind = chance.choice(
            ("application/json", "text/html", "text/event-stream; charset=utf-16", "", "\xff", "image/png")
        )
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nRetry-After: {chance.choice(RETRY_AFTERS)}\r\n"
        sized = f"Content-Length: {len(body)}\r\n\r\n"
        if chance.random() < 0.7:
            writer.write((head + sized).encode("latin-1") + body)
            await writer.drain()
            return True
        away = chance.choice((self._trap_url, "//[", "http://\xe2\x98\x83.example/", ""))
        location = f"Location: {away}\r\n"
        moved = f"HTTP/1.1 {chance.choice(REDIRECTS)} X\r\n{location}"
        smuggled = (
            json.dumps({**self._good("/generation", {}), "request_id": SMUGGLED}).replace("你好", SMUGGLED).encode()
        )
        second = f"HTTP/1.1 200 X\r\nContent-Length: {len(smuggled)}\r\n\r\n".encode() + smuggled
        framings: dict[str, bytes | list[bytes]] = {
            "redirect": (moved + sized).encode("latin-1") + body,
            "bomb": f"HTTP/1.1 200 X\r\nContent-Encoding: gzip\r\nContent-Length: {len(BOMB)}\r\n\r\n".encode() + BOMB,
            "truncated": (head + f"Content-Length: {len(body) + 9}\r\n\r\n").encode("latin-1") + body,
            "to the end": (head + "\r\n").encode("latin-1") + body,
            "chunked": (head + "Transfer-Encoding: chunked\r\n\r\n").encode("latin-1")
            + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
            "bad chunks": (head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n").encode("latin-1") + body,
            "bad length": (head + "Content-Length: -5\r\n\r\n").encode("latin-1") + body,
            "two lengths": (head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n").encode("latin-1") + body,
            "early hints": b"HTTP/1.1 103 X\r\n\r\n" * 50 + (head + sized).encode("latin-1") + body,
            "long header": (head + f"X: {'x' * 200_000}\r\n" + sized).encode("latin-1") + body,
            "garbage": chance.randbytes(500),
            "nothing": b"",
            "old": f"HTTP/1.0 200 X\r\n{sized}".encode() + body,
            "two answers": (head + sized).encode("latin-1") + body + second,
            "huge": (head + "\r\n").encode("latin-1") + b"[" + b"1," * 6_000_000,
            "drips": [(head + sized).encode("latin-1"), *(body[at : at + 1] for at in range(8))],
            "late": [b"", b"", b""],
        }  # fmt: skip
        framing = chance.choice(tuple(framings))
        self.tried[f"framing: {framing}"] += 1
        whole = framings[framing]
        for piece in whole if isinstance(whole, list) else [whole]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(LONG_SECONDS / 4 if isinstance(whole, list) else 0)
        return framing in {"chunked", "early hints", "two answers"}
