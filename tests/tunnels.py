"""A way through which a product reaches another service, and which a test can block."""

import asyncio
import re
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import unquote

CHUNK_BYTES = 64 * 1024
_PUT = re.compile(rb"PUT /[^/ ]+/([^ ?]+)[^ ]* HTTP/1\.1\r\n")


class Tunnel:
    """Passes bytes from a port of its own on to an address, on a loop in a thread of its own.

    `put_keys` are the objects that HTTP requests through it have stored, or meant to.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.put_keys: set[str] = set()

    @property
    def url(self) -> str:
        """The address of an HTTP service behind it."""
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Begin to pass, on the same port as before."""
        self._do(self._open())

    def block(self) -> None:
        """Drop every connection, and refuse new ones until it is opened again."""
        self._do(self._block())

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()
        self.open()

    def end(self) -> None:
        """Be gone."""
        self.block()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result(10)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _block(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._passing):
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        ends = {writer}
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            ends.add(far_writer)
            self._writers.add(far_writer)
            await asyncio.gather(self._pass(reader, far_writer, is_request=True), self._pass(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # whoever notices is at one of the ends
        finally:
            self._passing.discard(task)
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_request: bool = False
    ) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                if is_request:
                    self.put_keys.update(unquote(key.decode()) for key in _PUT.findall(chunk))
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()


@contextmanager
def tunnel_to(host: str, port: int) -> Iterator[Tunnel]:
    """A way to an address that is gone at the end."""
    tunnel = Tunnel(host, port)
    tunnel.start()
    try:
        yield tunnel
    finally:
        tunnel.end()
