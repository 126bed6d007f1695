from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import oss2
import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .services import ANYBODY
from .test_objects import open_bucket

CONTENT = bytes(range(256)) * 400
BROKEN = oss2.exceptions.RequestError


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions()) as server:
        yield server


@pytest.fixture
def bucket(server: RunningSandbox) -> Iterator[oss2.Bucket]:
    yield open_bucket(server, "media")
    switch_on(server)


def switch_on(server: RunningSandbox, *oss: dict[str, Any]) -> None:
    ANYBODY.put(f"{server.http_url}/_sandbox/faults", json={"oss": list(oss)}).raise_for_status()


@pytest.mark.parametrize(
    ("how", "status", "code"), [("unavailable", 503, "ServiceUnavailable"), ("denied", 403, "AccessDenied")]
)
def test_storage_can_refuse(server: RunningSandbox, bucket: oss2.Bucket, how: str, status: int, code: str) -> None:
    switch_on(server, {"how": how, "count": 2})
    for _ in range(2):
        with pytest.raises(oss2.exceptions.ServerError) as refused:
            bucket.put_object(how, CONTENT)
        assert (refused.value.status, refused.value.code) == (status, code)
    assert not bucket.object_exists(how)
    bucket.put_object(how, CONTENT)
    assert bucket.get_object(how).read() == CONTENT


def test_a_single_fault_needs_no_list_and_can_last(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    body = {"oss": {"method": "DELETE"}}
    told = ANYBODY.put(f"{server.http_url}/_sandbox/faults", json=body).json()
    assert told["oss"] == [{"how": "unavailable", "method": "DELETE", "seconds": 0.0, "count": -1}]
    bucket.put_object("kept", b"x")
    for _ in range(3):
        with pytest.raises(oss2.exceptions.ServerError):
            bucket.delete_object("kept")
    assert bucket.get_object("kept").read() == b"x"


def test_storage_can_be_slow(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    switch_on(server, {"how": "slow", "seconds": 0.3, "method": "PUT", "count": 1})
    started = time.monotonic()
    assert bucket.put_object("slow", CONTENT).status == 200
    assert time.monotonic() - started >= 0.3
    assert bucket.get_object("slow").read() == CONTENT


def test_what_is_slow_is_stored_though_nobody_waits(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    switch_on(server, {"how": "slow", "seconds": 1.0, "method": "PUT"})
    with pytest.raises(httpx.ReadTimeout):
        ANYBODY.put(bucket.sign_url("PUT", "unwaited", 60), content=CONTENT, timeout=0.3)
    assert bucket.get_object("unwaited").read() == CONTENT


def test_a_connection_can_be_cut_before_anything_is_stored(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    bucket.put_object("old", b"x")
    switch_on(server, {"how": "cut"})
    with pytest.raises(BROKEN):
        bucket.put_object("new", CONTENT)
    with pytest.raises(BROKEN):
        bucket.delete_object("old")
    with pytest.raises(BROKEN):
        bucket.head_object("old")
    switch_on(server)
    assert not bucket.object_exists("new")
    assert bucket.object_exists("old")


def test_an_upload_can_be_cut_in_its_middle(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    switch_on(server, {"how": "cut", "method": "PUT", "count": 1})
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"PUT /media/half HTTP/1.1\r\nHost: sandbox\r\nContent-Length: 1000000\r\n\r\n" + CONTENT)
        assert connection.recv(1) == b""


def test_a_download_can_be_cut_in_its_middle(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    bucket.put_object("cut", CONTENT)
    switch_on(server, {"how": "cut", "method": "GET", "count": 1})
    received = bytearray()
    with (
        pytest.raises(httpx.RemoteProtocolError),
        ANYBODY.stream("GET", f"{server.http_url}/media/cut") as response,
    ):
        assert (response.status_code, response.headers["content-length"]) == (200, str(len(CONTENT)))
        for piece in response.iter_raw():
            received += piece
    assert received == CONTENT[: len(CONTENT) // 2]
    assert ANYBODY.get(f"{server.http_url}/media/cut").content == CONTENT


def test_a_connection_can_be_cut_after_the_work(server: RunningSandbox, bucket: oss2.Bucket) -> None:
    bucket.put_object("old", b"x")
    switch_on(server, {"how": "cut_after", "method": "PUT", "count": 1}, {"how": "cut_after", "method": "DELETE"})
    with pytest.raises(BROKEN):
        bucket.put_object("new", CONTENT)
    with pytest.raises(BROKEN):
        bucket.delete_object("old")
    assert bucket.get_object("new").read() == CONTENT
    assert not bucket.object_exists("old")
