"""A small OSS: objects of one bucket over real HTTP, V4 signatures checked, and failures on demand."""

import hashlib
import hmac
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from crcmod import mkCrcFun

REGION = "cn-hangzhou"
BUCKET = "voices"
KEY_ID = "test-key-id"
KEY_SECRET = "test-key-secret"
REQUEST_ID = "5C3D9175B6FC201293AD4890"

# CRC-64/ECMA-182 in the reflected form that OSS gives in x-oss-hash-crc64ecma.
crc64 = mkCrcFun(0x142F0E1EBA9EA3693, initCrc=0, xorOut=0xFFFFFFFFFFFFFFFF, rev=True)


class OssServer(ThreadingHTTPServer):
    """The state of the store; `faults` holds what the next requests meet instead of a proper answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OssRequest)
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.faults: deque[Callable[[OssRequest], None]] = deque()
        self.always: Callable[[OssRequest], None] | None = None
        self.delay_seconds = 0.0
        self.methods: list[str] = []
        self.connections = 0
        self.running = 0
        self.most_running = 0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @classmethod
    @contextmanager
    def serving(cls) -> Iterator[Self]:
        with cls() as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server
            server.shutdown()
            thread.join()


class OssRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OssServer

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def serve(self) -> None:
        server = self.server
        server.methods.append(self.command)
        with server.lock:
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        time.sleep(server.delay_seconds)
        try:
            fault = server.faults.popleft() if server.faults else server.always
            (fault or OssRequest.answer)(self)
        finally:
            with server.lock:
                server.running -= 1

    do_GET = do_PUT = do_DELETE = serve  # noqa: N815 - the names that the base class looks up

    def answer(self) -> None:
        body = self.body()
        if not self.signature_is_right():
            self.refuse(403, "SignatureDoesNotMatch")
            return
        key = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
        if self.command == "PUT":
            self.server.objects[key] = (body, self.headers["Content-Type"])
            self.send(200, crc=crc64(body))
        elif self.command == "DELETE":
            self.server.objects.pop(key, None)
            self.send(204)
        elif key in self.server.objects:
            content, content_type = self.server.objects[key]
            self.send(200, content, content_type, crc64(content))
        else:
            self.refuse(404, "NoSuchKey")

    def body(self) -> bytes:
        """Read the whole body; ConnectionError when the client stops before its end."""
        size = int(self.headers["Content-Length"] or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the body ended early")
        return body

    def send(self, status: int, content: bytes = b"", content_type: str = "", crc: int | None = None) -> None:
        self.send_response(status)
        self.send_header("x-oss-request-id", REQUEST_ID)
        if crc is not None:
            self.send_header("x-oss-hash-crc64ecma", str(crc))
        if content_type:
            self.send_header("Content-Type", content_type)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        details = f"<Code>{code}</Code><Message>m</Message><OSSAccessKeyId>{KEY_ID}</OSSAccessKeyId>"
        self.send(status, f"<Error>{details}</Error>".encode(), "application/xml")

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def signature_is_right(self) -> bool:
        """Compute the V4 signature as OSS documents it ("在Header中包含V4签名", "在URL中包含V4签名")."""
        path, query = urlsplit(self.path)[2:4]
        params = dict(parse_qsl(query, keep_blank_values=True))
        if "x-oss-signature" in params:
            given, moment = params.pop("x-oss-signature"), params["x-oss-date"]
            headers: dict[str, str] = {}
        else:
            given = self.headers["authorization"].partition("Signature=")[2].partition(",")[0]
            moment = self.headers["x-oss-date"]
            signed = {"content-type", "content-md5"}
            named = {name.lower(): value for name, value in self.headers.items()}
            headers = {k: v for k, v in named.items() if k in signed or k.startswith("x-oss-")}
        scope = f"{moment[:8]}/{REGION}/oss/aliyun_v4_request"
        canonical = "\n".join(
            [
                self.command,
                quote(unquote(path), safe="/-_.~"),
                "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(params.items())),
                "".join(f"{name}:{value}\n" for name, value in sorted(headers.items())),
                "",
                "UNSIGNED-PAYLOAD",
            ]
        )
        text = f"OSS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"aliyun_v4{KEY_SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.compare_digest(given, hmac.digest(key, text.encode(), "sha256").hex())


def busy(request: OssRequest) -> None:
    """503, after the body was read."""
    request.body()
    request.refuse(503, "ServiceUnavailable")


def hang_up(request: OssRequest) -> None:
    """The connection breaks without an answer."""
    request.hang_up()


def silent(request: OssRequest) -> None:
    """No answer for longer than the tests' timeout."""
    request.body()
    time.sleep(0.8)
    request.hang_up()


def refusing(status: int, code: str) -> Callable[[OssRequest], None]:
    """An answer that another try would not change."""

    def refuse(request: OssRequest) -> None:
        request.body()
        request.refuse(status, code)

    return refuse
