"""Addresses that clients name, on every route that takes one: refused before anybody is asked, with no record left.

Nobody here fetches them. It is the provider who does, from its own network: a name is judged by its spelling, and one
that its owner has lead into some network leads there from the provider's side only.
"""

import asyncio
from typing import Any

import httpx
import pytest

from tests.conftest import Account
from tests.hearing import FLASH
from tests.servers import Sandbox

HOSTS = [
    "localhost", "LOCALHOST", "localhost.", "a.localhost", "ｌocalhost", "loc%61lhost", "printer", "nas.local",
    "db.internal", "metadata.google.internal", "metadata.tencentyun.com", "127.0.0.1", "127.0.0.1.", "127.1", "127.0.1",
    "127.255.255.254", "0", "0.0.0.0", "0x7f.1", "0x7f000001", "0X7F.0.0.1", "2130706433", "4294967297",  # noqa: S104
    "017700000001",
    "0177.0.0.1", "00177.0.0.01", "１２７.0.0.1", "127。0。0。1", "127．0．0．1", "①②⑦.0.0.1", "%31%32%37.0.0.1",
    "127.0.0.1%2f.example.com", "10.0.0.1", "10.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "192.0.2.1",
    "198.18.0.1", "100.64.0.1", "100.100.100.200", "169.254.169.254", "169.254.0.23", "0xA9FEA9FE", "224.0.0.1",
    "255.255.255.255", "[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]",
    "[fe80::1]", "[fe80::1%25eth0]", "[::1%25lo]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[::1",
    "::1", "[127.0.0.1]", "[v1.a]", "example.com:0", "example.com:99999", "example.com:x", "a..example.com", "-a.com",
]  # fmt: skip
WHOLE = [
    "file:///etc/passwd", "FILE:///etc/passwd", "ftp://example.com/a.mp3", "gopher://example.com/_x", "dict://a.com:1/",
    "ldap://example.com/", "jar:http://example.com!/", "data:audio/mpeg;base64,AAAA", "javascript:alert(1)",
    "oss://dashscope-instant/x/a.mp3", "ws://example.com/", "unix:/run/x.sock", "//example.com/a.mp3", "example.com/a",
    "http:example.com/a.mp3", "http:///etc/passwd", "http://", "https://?a", "http://good.com@127.0.0.1/",
    "http://user:secret@example.com/", "http://@example.com/", "http://example.com\\@127.0.0.1/", "http:\\\\127.0.0.1/",
    "http://example.com#@127.0.0.1/", "http://127.0.0.1#.example.com/", "http://127.0.0.1?.example.com/",
    "http://exa\tmple.com/", "http://example.com/\r\nHost: 127.0.0.1", "\nhttp://example.com/", " http://example.com/",
    "http://example.com/\0", "http://exam ple.com/", "http://example.com/" + "a" * 5000,
    "http://" + "a." * 500 + "com/",
]  # fmt: skip
ADDRESSES = [*(f"http://{host}/a.mp3" for host in HOSTS), *WHOLE]


def requests_for(address: str) -> list[dict[str, Any]]:
    """Every way to name an address."""
    voice = {"target_model": "cosyvoice-v3-flash", "prefix": "mine", "audio_url": address}
    changed = "/api/audio/voice/cosyvoice-v3-flash-mine-x"
    heard = {"model": FLASH, "audio_url": address}
    return [
        {"method": "post", "url": "/api/audio/asr/recognize", "json": heard},
        {"method": "post", "url": "/api/audio/asr/recognize", "files": form(heard)},
        {"method": "post", "url": "/api/audio/asr/transcribe", "json": {"model": "paraformer-v2", "file_url": address}},
        {"method": "post", "url": "/api/audio/voice/create", "json": voice},
        {"method": "post", "url": "/api/audio/voice/create", "files": form(voice)},
        {"method": "put", "url": changed, "json": {"audio_url": address}},
        {"method": "put", "url": changed, "files": form({"audio_url": address})},
    ]


def form(fields: dict[str, str]) -> dict[str, tuple[None, str]]:
    return {name: (None, value) for name, value in fields.items()}


async def all_refused(account: Account, sandbox: Sandbox, addresses: list[str]) -> None:
    limit = asyncio.Semaphore(8)

    async def ask(request: dict[str, Any]) -> httpx.Response:
        async with limit:
            return await account.client.request(**request)

    requests = [request for address in addresses for request in requests_for(address)]
    for request, answer in zip(requests, await asyncio.gather(*map(ask, requests)), strict=True):
        assert answer.status_code == 400, (request, answer.text)
        assert answer.json()["error"] == "INVALID_REQUEST"
        assert "secret" not in answer.text
    assert sandbox.requests(account.api_key) == []
    assert (await account.history())["total"] == 0


def test_there_are_many_of_them() -> None:
    assert len(set(ADDRESSES)) == len(ADDRESSES) > 100


@pytest.mark.parametrize("first", range(0, len(ADDRESSES), 27))
async def test_no_route_passes_on_an_address_that_is_not_public(account: Account, sandbox: Sandbox, first: int) -> None:
    await all_refused(account, sandbox, ADDRESSES[first : first + 27])


async def test_a_name_is_passed_on_unread_for_the_provider_to_look_up(account: Account, sandbox: Sandbox) -> None:
    for name in ("127.0.0.1.nip.io", "localtest.me", "rebinder.example.com"):
        answer = await account.client.post(
            "/api/audio/asr/transcribe", json={"model": "paraformer-v2", "file_url": f"http://{name}/a.mp3"}
        )
        assert answer.status_code == 200, answer.text
    asked = [str(request) for request in sandbox.requests(account.api_key)]
    assert len(asked) >= 3
