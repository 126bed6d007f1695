"""What stands in requests: JSON and forms that are too deep, too large, of another type, or no text. Never a 500."""

import asyncio
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.databases import create_database, drop_database, postgres_url, provider, rows, run_apart
from tests.hearing import FLASH, tone
from tests.servers import Sandbox, Server, run_backend
from tests.test_hostile_transport import MEGABYTE, Peer

AT_ONCE = 16
ENROLLMENT_PATH = "/api/v1/services/audio/tts/customization"
RECOGNIZE, CREATE = "/api/audio/asr/recognize", "/api/audio/voice/create"
SOURCES = {"audio_url", "audio_base64", "file_url"}
# What no database and no provider takes, as it stands in JSON.
NO_TEXTS = [r'"\u0000"', r'"a\u0000b"', r'"a\u001fb"', r'"\ud800"', r'"a\udc00\ud800"']
HUGE = ["1e400", "-1e400", "9" * 5000, "-" + "9" * 400, "NaN", "-Infinity"]
# Values of another type than the one that is documented.
OTHER_TYPES = {
    "boolean": ['"true"', '"yes"', "1", "0", "1.0", "[]"],
    "integer": ['"5"', "5.5", "true", "[5]", *HUGE],
    "number": ['"1"', "true", "[1]", *HUGE],
    "string": ["5", "true", "[]", "{}", '["zh"]'],
    "array": ["5", "{}", "[[]]", '[{"a": 1}]', '["\\u0000"]'],
}
NO_OBJECTS = {
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"model":' * 20_000,
    "deep and complete": b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep where nobody looks": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"model": ' + b"9" * 100_000 + b"}",
    "no end": b'{"model": "',
    "two": b"{}{}",
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "UTF-32": '{"model": "x"}'.encode("utf-32"),
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\x80"}',
    "a raw surrogate": b'{"model": "\xed\xa0\x80"}',
    "raw NUL": b'{"model": "\0"}',
    "nothing": b"null",
    "a number": b"1",
    "compressed": bytes.fromhex("1f8b08000000000000ff") + b"\0" * 20,
}


def settings_of(sandbox: Sandbox) -> dict[str, str]:
    return {**sandbox.settings, "LOGIN_LIMIT": "100000/minute", "REGISTRATION_LIMIT": "100000/minute"}


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile_bodies")
    (spool := folder / "temporary").mkdir()
    with run_backend(folder, {**settings_of(sandbox), "TMPDIR": str(spool)}) as running:
        yield running


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    name = run_apart(create_database(provider.template))
    settings = {"DATABASE_URL": postgres_url(name), "DATABASE_POOL_SIZE": "5"}
    with run_backend(tmp_path_factory.mktemp("postgresql"), {**settings_of(sandbox), **settings}) as running:
        yield running
    run_apart(drop_database(name))


@pytest.fixture(params=["on_sqlite", "on_postgresql"])
def server(request: pytest.FixtureRequest) -> Server:
    """The product on a database of either kind."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
async def user(server: Server, create_account: CreateAccount) -> Account:
    """Somebody whom no route refuses for who he is."""
    return promoted(await create_account(server), server)


def promoted(account: Account, server: Server) -> Account:
    rows(server, "UPDATE users SET is_admin = TRUE WHERE id = ? RETURNING id", uuid.UUID(account.user_id))
    return account


async def all_refused(
    user: Account, sandbox: Sandbox, requests: list[dict[str, Any]], statuses: frozenset[int] = frozenset({400})
) -> None:
    """Every request is refused in the envelope, and nothing is bought of the provider."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def ask(request: dict[str, Any]) -> httpx.Response:
        async with limit:
            return await user.client.request(**request)

    for request, answer in zip(requests, await asyncio.gather(*map(ask, requests)), strict=True):
        assert answer.status_code in statuses, (answer.status_code, answer.text, str(request)[:300])
        told = answer.json()
        assert (told["code"], told["data"]) == (answer.status_code, None)
        assert told["error"]
        assert answer.headers["x-request-id"]
    # Whether there is a voice of a strange name is asked of the provider, who is told the name in JSON.
    assert {request["path"] for request in sandbox.requests(user.api_key)} <= {ENROLLMENT_PATH}
    assert sandbox.ledger(user.api_key) == []


# ---- JSON


def forms_of(api: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every route that takes JSON, with the fields that it documents."""
    schemas = api["components"]["schemas"]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content:
                schema = content["schema"]
                named = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
                somewhere = path.format(voice_id="cosyvoice-v3-flash-x-1", user_id=uuid.UUID(int=1))
                yield method, somewhere, named["properties"]


def type_of(field: dict[str, Any]) -> str:
    """What a field is when it is not null."""
    kinds = [each["type"] for each in [field, *field.get("anyOf", [])] if "type" in each]
    return next((kind for kind in kinds if kind != "null"), "enum")


def example_of(fields: dict[str, Any]) -> dict[str, Any]:
    """A request that would be answered, but for what is put into it."""
    example = {name: field["examples"][0] for name, field in fields.items() if field.get("examples")}
    return {**example, **({"text": "hello"} if "text" in fields else {})}


def json_request(method: str, path: str, content: bytes) -> dict[str, Any]:
    return {"method": method, "url": path, "content": content, "headers": {"Content-Type": "application/json"}}


def with_field(example: dict[str, Any], name: str, value: str) -> bytes:
    rest = ", ".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in example.items() if key != name)
    return f'{{{rest}{", " if rest else ""}"{name}": {value}}}'.encode()


async def test_no_field_takes_what_is_no_text(user: Account, sandbox: Sandbox) -> None:
    api = (await user.client.get("/openapi.json")).json()
    requests = [
        json_request(method, path, with_field(example_of(fields), name, value))
        for method, path, fields in forms_of(api)
        for name, field in fields.items()
        if type_of(field) == "string"
        for value in NO_TEXTS
    ]
    assert len(requests) > 100
    await all_refused(user, sandbox, requests)


async def test_no_field_takes_another_type(on_sqlite: Server, create_account: CreateAccount, sandbox: Sandbox) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    api = (await user.client.get("/openapi.json")).json()
    requests = [
        json_request(method, path, with_field(example_of(fields), name, value))
        for method, path, fields in forms_of(api)
        for name, field in fields.items()
        if name != "monthly"  # money may be written as text and as a number
        for value in OTHER_TYPES.get(type_of(field), [])
    ]
    assert len(requests) > 200
    await all_refused(user, sandbox, requests)


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS.keys())
async def test_no_route_takes_what_is_no_object(
    on_sqlite: Server, create_account: CreateAccount, sandbox: Sandbox, content: bytes
) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    api = (await user.client.get("/openapi.json")).json()
    requests = [json_request(method, path, content) for method, path, _ in forms_of(api)]
    if content.startswith(b"\x1f\x8b"):
        for request in requests:
            request["headers"]["Content-Encoding"] = "gzip"
    assert len(requests) > 8
    await all_refused(user, sandbox, requests)


# ---- Addresses and headers

NO_NAMES = ["%00", "a%00b", "%01", "%ed%a0%80", "%ff", "%c0%ae%c0%ae", "a" * 3000, "9" * 5000, "-1", "1e5", "NaN", "١٢"]


async def test_no_address_breaks_a_route(user: Account, sandbox: Sandbox) -> None:
    api = (await user.client.get("/openapi.json")).json()
    paths, queries = [], []
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                named = f"{{{parameter['name']}}}"
                if parameter["in"] == "path" and method != "post":
                    paths += [(method, path.replace(named, text)) for text in NO_NAMES]
                elif parameter["in"] == "query":
                    base = path.replace("{voice_id}", "x").replace("{task_id}", "x").replace("{record_id}", "1")
                    queries += [(method, f"{base}?{parameter['name']}={text}") for text in NO_NAMES[:6]]
    assert len(paths) > 60
    assert len(queries) > 60
    await all_refused(user, sandbox, [{"method": m, "url": url} for m, url in paths], frozenset({400, 404}))
    for method, url in queries:
        answer = await user.client.request(method, url, headers={"Content-Type": "application/json"})
        assert answer.status_code in {200, 400, 401, 404}, (url, answer.text)


@pytest.mark.parametrize("value", [b"", b"a\tb", b"\x80\xff", "键".encode(), b"a" * 256, b"a" * 60_000])
async def test_headers_are_judged(user: Account, sandbox: Sandbox, value: bytes) -> None:
    body = with_field({"model": "cosyvoice-v3-flash", "voice": "longanyang"}, "text", '"hello"')
    asked: dict[str, Any] = {"url": "/api/audio/tts/synthesize", "method": "post", "content": body}
    refused = await user.client.request(
        **asked, headers=[(b"Content-Type", b"application/json"), (b"Idempotency-Key", value)]
    )
    assert (refused.status_code, refused.json()["error"]) == (400, "INVALID_REQUEST")
    for name in (b"Authorization", b"X-Request-Id", b"Range", b"Accept-Language"):
        answer = await user.client.get("/api/user/me", headers=[(name, value)])
        assert answer.status_code in {200, 401}, (name, answer.text)
        assert answer.headers["x-request-id"].isascii()
        assert len(answer.headers["x-request-id"]) < 200
    assert sandbox.calls(user.api_key) == []


# ---- Forms


def part(disposition: bytes, content: bytes = b"x", headers: bytes = b"") -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + headers + b"\r\n" + content + b"\r\n"


MODEL = part(b'name="model"', FLASH.encode())
FILE = part(b'name="file"; filename="a.wav"', b"R" * (2 * MEGABYTE))  # large enough to be kept on disk
FORMS = {
    "no end": MODEL + FILE,
    "no end of a part": MODEL + FILE[:-100],
    "no end of a header": MODEL + b"--x\r\nContent-Disposition: form-data; na",
    "no name": FILE + part(b"x=1") + b"--x--",
    "an empty name": FILE + part(b'name=""', b"R" * 1_100_000) + b"--x--",
    "no disposition": FILE + b"--x\r\nX: y\r\n\r\nz\r\n--x--",
    "many parts": FILE + MODEL * 1000 + b"--x--",
    "many files": FILE + part(b'name="a"; filename="a"') * 100 + b"--x--",
    "the same file twice": MODEL + FILE + FILE + b"--x--",
    "a file that is a field, too": MODEL + FILE + part(b'name="file"') + b"--x--",
    "many headers": MODEL + part(b'name="file"; filename="a"', headers=b"X: y\r\n" * 10_000) + b"--x--",
    "a long header": MODEL + part(b'name="file"; filename="a"', headers=b"X: " + b"y" * MEGABYTE + b"\r\n") + b"--x--",
    "a long file name": MODEL + part(b'name="file"; filename="' + b"a" * 100_000 + b'"') + b"--x--",
    "a long name": part(b'name="' + b"a" * 100_000 + b'"') + FILE + b"--x--",
    "a long field": part(b'name="model"', b"a" * (MEGABYTE + 1)) + FILE + b"--x--",
    "a field that is no text": part(b'name="model"', b"\xff\xfe\0") + FILE + b"--x--",
    "NUL in a field": part(b'name="model"', b"qwen\0") + FILE + b"--x--",
    "NUL in a name": part(b'name="mod\0el"', b"x") + FILE + b"--x--",
    "a form in a form": MODEL + part(b'name="file"', FILE, b"Content-Type: multipart/mixed; boundary=x\r\n") + b"--x--",
    "only ends": b"--x--" * 100_000,
    "only beginnings": b"--x\r\n" * 100_000,
    "nothing": b"",
}


def held_files(server: Server) -> list[str]:
    """The temporary files that a server has open."""
    folder = Path(f"/proc/{server.process.pid}/fd")
    links = [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]
    return [link for link in links if "temporary" in link]


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS.keys())
async def test_forms_of_any_make_are_refused_and_leave_nothing(
    on_sqlite: Server, create_account: CreateAccount, sandbox: Sandbox, content: bytes
) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    requests = [{"method": "post", "url": path, "content": content, "headers": kind} for path in (RECOGNIZE, CREATE)]
    await all_refused(user, sandbox, requests)
    assert held_files(on_sqlite) == []


async def test_who_leaves_in_the_middle_of_a_form_leaves_nothing(
    on_sqlite: Server, create_account: CreateAccount
) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    port = int(on_sqlite.url.rpartition(":")[2])
    head = f"POST {RECOGNIZE} HTTP/1.1\r\nHost: x\r\nAuthorization: {user.client.headers['authorization']}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000000\r\n\r\n"

    async def eventually(is_held: bool) -> None:
        async with asyncio.timeout(10):
            while bool(held_files(on_sqlite)) is not is_held:
                await asyncio.sleep(0.02)

    peer = await asyncio.to_thread(Peer, port, (head + kind).encode() + MODEL + FILE)
    with peer:
        await eventually(True)
    await eventually(False)


@pytest.mark.parametrize("boundary", ["", "y" * 10_000, '"x', "x\\", "=", "x; charset=utf-7", "x; charset=idna"])
async def test_boundaries_of_any_make_are_refused(
    on_sqlite: Server, create_account: CreateAccount, sandbox: Sandbox, boundary: str
) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    requests = [{"method": "post", "url": RECOGNIZE, "content": b"--y\r\n\r\n--y--", "headers": kind}]
    await all_refused(user, sandbox, requests)


NAMES = [
    b"../../../etc/passwd",
    b"..\\..\\x.wav",
    b"/etc/passwd",
    b"a\0b.wav",
    b"\xff\xfe",
    b"a" * 3000,
    b"",
    b"..",
    b"%s{0}",
]


async def test_names_of_files_lead_nowhere(on_sqlite: Server, create_account: CreateAccount) -> None:
    user = promoted(await create_account(on_sqlite), on_sqlite)
    before = {file.parent for file in on_sqlite.folder.rglob("*")}
    audio = tone(1.1)
    for name in NAMES:
        content = MODEL + part(b'name="file"; filename="' + name.replace(b"\\", b"\\\\") + b'"', audio) + b"--x--\r\n"
        answer = await user.client.post(
            RECOGNIZE, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert answer.status_code == 200, answer.text
    shown = [json.loads(item["input_data"]) for item in (await user.history())["items"]]
    assert len(shown) == len(NAMES)
    assert not any("/" in str(each) or "\\u0000" in json.dumps(each) or ".." + "\\" in str(each) for each in shown)
    assert {file.parent for file in on_sqlite.folder.rglob("*")} == before
    assert held_files(on_sqlite) == []


# ---- Files on this machine

WAYS_OUT = [
    b"../jwt_secret", b"..%2fjwt_secret", b"%2e%2e/jwt_secret", b"%2e%2e%2fjwt_secret", b"%252e%252e%252fjwt_secret",
    b"..%5cjwt_secret", b"..\\jwt_secret", b"..%c0%afjwt_secret", b"%c0%ae%c0%ae/jwt_secret", b"..%ef%bc%8fjwt_secret",
    b"....//jwt_secret", b"./../jwt_secret", b"audio/../../jwt_secret", b"audio/..;/..;/jwt_secret", b"/etc/passwd",
    b"//etc/passwd", b"%2fetc%2fpasswd", b"file:///etc/passwd", b"audio/secret.mp3%00.mp3", b"audio/link.mp3",
    b"audio/folder/jwt_secret", b"audio/voice/x.wav", b"AUDIO/VOICE/x.wav", b"audio/work/x.pcm",
    b"audio%2fvoice%2fx.wav", b"audio//voice/x.wav", b"audio/./voice/x.wav", b"audio", b"audio/", b".", b"..", b"%2e",
    b"",
]  # fmt: skip


async def test_no_way_leads_out_of_the_folder_of_media(on_sqlite: Server) -> None:
    media = on_sqlite.data / "media"
    for key in ("audio/voice/x.wav", "audio/work/x.pcm", "audio/seen.mp3"):
        (media / key).parent.mkdir(parents=True, exist_ok=True)
        (media / key).write_bytes(b"heard")
    (media / "audio/link.mp3").symlink_to(on_sqlite.data / "jwt_secret")
    (media / "audio/folder").symlink_to(on_sqlite.data)
    port = int(on_sqlite.url.rpartition(":")[2])

    def ask(way: bytes) -> bytes:
        head = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with Peer(port, b"GET /media/" + way + head) as peer:
            return peer.hear()

    secret = (on_sqlite.data / "jwt_secret").read_bytes().strip()
    assert (await asyncio.to_thread(ask, b"audio/seen.mp3")).endswith(b"heard")
    for way in WAYS_OUT:
        answer = await asyncio.to_thread(ask, way)
        assert answer.split()[1] in {b"404", b"400"}, (way, answer)
        assert secret not in answer
        assert b"heard" not in answer
        assert b"root:" not in answer


# ---- Bodies that nobody asked for


async def test_a_body_that_goes_on_into_its_answer_ends_the_connection_and_is_no_bug(
    on_sqlite: Server, create_account: CreateAccount
) -> None:
    user = await create_account(on_sqlite)
    text = "今天天气真好，我们一起去公园散步吧。" * 2000
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": text, "async": True}
    record = (await user.client.post("/api/audio/tts/synthesize-long", json=body)).json()["data"]["record_id"]
    head = (
        f"GET /api/audio/records/{record}/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: {user.client.headers['authorization']}\r\n\r\n"
    )

    def flood() -> bytes:
        with Peer(int(on_sqlite.url.rpartition(":")[2]), head.encode()) as peer:
            begun = peer.socket.recv(65536)
            peer.repeat(b"400\r\n" + b"a" * 1024 + b"\r\n")
            return begun + peer.hear()

    assert (await asyncio.to_thread(flood)).startswith(b"HTTP/1.1 200")
    assert "request_failed" not in on_sqlite.log
    await user.client.post(f"/api/audio/records/{record}/cancel")
