"""Voices at the provider: what is sent, what is read, how lists are paged, and what is asked again (PROTOCOL §3)."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.dashscope import CloningOrder, Credential, EnrollmentClient, HttpClient, VoiceReport, may_have_worked
from app.dashscope.enrollment import MAX_PAGES, MAX_VOICE_ID_CHARS, PAGE_SIZE, read_report
from app.dashscope.retries import MAX_ATTEMPTS
from app.errors import (
    AppError,
    AudioTooLong,
    ConnectionLost,
    InvalidApiKey,
    InvalidAudio,
    InvalidModel,
    Throttled,
    UnclearAnswer,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
    VoiceLimitExceeded,
    VoiceNotFound,
)
from tests.dashscope.http_provider import Act, HttpProvider, Line, answers, refuses, sends, throttles, written

PATH = "/api/v1/services/audio/tts/customization"
RESOLVE = "X-DashScope-OssResourceResolve"
ORDER = CloningOrder("cosyvoice-v3-flash", "myvoice")
URL = "https://example.com/sample.wav"
VOICE = "cosyvoice-v3-flash-myvoice-0123abcd"
TIMES = {"gmt_create": "2026-01-02 03:04:05", "gmt_modified": "2026-01-02 03:04:06"}
CREATED, MODIFIED = datetime(2026, 1, 1, 19, 4, 5, tzinfo=UTC), datetime(2026, 1, 1, 19, 4, 6, tzinfo=UTC)
GONE = refuses("BadRequest.ResourceNotExist", "The Required resource not exist.")


def gives(output: object) -> Act:
    """A success as it is documented."""
    return answers({"output": output, "usage": {"count": 1}, "request_id": "req-1"})


class Account:
    """A user's voices at a provider that the test tells what to do."""

    def __init__(self, provider: HttpProvider, http: HttpClient) -> None:
        self.provider = provider
        self.credential = provider.credential
        self.client = EnrollmentClient(http, self.take_turn)
        self.turns: list[Credential] = []

    async def take_turn(self, credential: Credential) -> None:
        self.turns.append(credential)

    async def create(self, order: CloningOrder = ORDER, url: str = URL) -> str:
        return await self.client.create(self.credential, order, url)

    async def find(self, prefix: str | None = None) -> list[VoiceReport]:
        return await self.client.find(self.credential, prefix)

    async def query(self) -> VoiceReport:
        return await self.client.query(self.credential, VOICE)

    async def update(self, url: str = URL) -> None:
        await self.client.update(self.credential, VOICE, url)

    async def delete(self) -> None:
        await self.client.delete(self.credential, VOICE)

    @property
    def asked(self) -> list[Any]:
        """What the provider was asked for."""
        return [request.json["input"] for request in self.provider.requests]


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    """An account that waits long enough for a busy machine."""
    async with HttpProvider.run() as provider, provider.client() as http:
        account = Account(provider, http)
        yield account


Call = Callable[[Account], Awaitable[object]]
CALLS: dict[str, Call] = {
    "create": Account.create,
    "find": Account.find,
    "query": Account.query,
    "update": Account.update,
    "delete": Account.delete,
}
GOOD: dict[str, dict[str, Any]] = {
    "create": {"voice_id": VOICE},
    "find": {"voice_list": []},
    "query": {**TIMES, "status": "OK", "target_model": "cosyvoice-v3-flash", "resource_link": "https://x/y"},
    "update": {},
    "delete": {},
}
every_call = pytest.mark.parametrize("name", CALLS)


async def failure_of(work: Awaitable[object]) -> AppError:
    """What kept it from an answer."""
    with pytest.raises(AppError) as failed:
        await work
    return failed.value


# ---- What is sent

CREATE = {"action": "create_voice", "target_model": ORDER.target_model, "prefix": "myvoice", "url": URL}
LIST = {"action": "list_voice", "page_index": 0, "page_size": PAGE_SIZE}
ASKED: dict[str, tuple[Call, dict[str, Any], dict[str, Any]]] = {
    "create": (Account.create, CREATE, GOOD["create"]),
    "create with languages": (
        lambda account: account.create(replace(ORDER, language_hints=("en", "zh"))),
        {**CREATE, "language_hints": ["en", "zh"]},
        GOOD["create"],
    ),
    "find": (Account.find, LIST, GOOD["find"]),
    "find with a prefix": (lambda account: account.find("my"), {**LIST, "prefix": "my"}, GOOD["find"]),
    "query": (Account.query, {"action": "query_voice", "voice_id": VOICE}, GOOD["query"]),
    "update": (Account.update, {"action": "update_voice", "voice_id": VOICE, "url": URL}, {}),
    "delete": (Account.delete, {"action": "delete_voice", "voice_id": VOICE}, {}),
}


@pytest.mark.parametrize(("call", "asked", "output"), ASKED.values(), ids=ASKED.keys())
async def test_an_action_is_asked_for_as_documented(
    account: Account, call: Call, asked: dict[str, Any], output: dict[str, Any]
) -> None:
    account.provider.expect(gives(output))
    await call(account)
    (request,) = account.provider.requests
    assert (request.method, request.target) == ("POST", PATH)
    assert request.json == {"model": "voice-enrollment", "input": asked}
    assert request.header("Authorization") == account.credential.headers["Authorization"]
    assert request.header("Content-Type") == "application/json"
    assert [request.header(name) for name in (RESOLVE, "X-DashScope-WorkSpace", "X-DashScope-Async")] == [None] * 3
    assert account.turns == [account.credential]


@pytest.mark.parametrize(
    ("url", "resolve"),
    [
        ("oss://dashscope-instant/a/b.wav", "enable"),
        (URL, None),
        ("http://example.com/oss://x.wav", None),
        ("https://oss.example.com/a.wav?x=oss://y", None),
    ],
)
@pytest.mark.parametrize("name", ["create", "update"])
async def test_only_uploaded_samples_are_resolved(account: Account, name: str, url: str, resolve: str | None) -> None:
    account.provider.expect(gives(GOOD[name]))
    await (account.create(url=url) if name == "create" else account.update(url))
    (request,) = account.provider.requests
    assert (request.json["input"]["url"], request.header(RESOLVE)) == (url, resolve)


@every_call
async def test_a_workspace_is_named_in_every_action(account: Account, name: str) -> None:
    account.credential = replace(account.credential, workspace="ws-1")
    account.provider.expect(gives(GOOD[name]))
    await CALLS[name](account)
    assert account.provider.requests[0].header("X-DashScope-WorkSpace") == "ws-1"


@every_call
async def test_nothing_is_asked_out_of_turn(account: Account, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(credential: Credential) -> None:
        raise Throttled

    monkeypatch.setattr(account.client, "_wait_for_turn", refuse)
    assert type(await failure_of(CALLS[name](account))) is Throttled
    assert account.provider.requests == []


async def test_every_page_waits_for_its_own_turn(account: Account) -> None:
    shelve(account, Shelf(PAGE_SIZE + 1))
    await account.find()
    assert len(account.turns) == len(account.provider.requests) == 2


# ---- How answers are read


@every_call
async def test_an_answer_may_come_as_an_event(account: Account, name: str) -> None:
    answer = json.dumps({"output": GOOD[name], "usage": {"count": 1}, "request_id": "r"})
    event = f"id:1\nevent:result\n:HTTP_STATUS/200\ndata:{answer}\n\n"
    plain, framed = answers(answer.encode()), answers(event.encode(), content_type="text/event-stream")
    account.provider.expect(plain, framed)
    assert await CALLS[name](account) == await CALLS[name](account)


@every_call
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b"<html>", b'{"output":', b"data:\n\n"])
async def test_what_is_no_answer_is_unclear_and_not_asked_again(account: Account, name: str, body: bytes) -> None:
    account.provider.expect(answers(body))
    assert type(await failure_of(CALLS[name](account))) is UnclearAnswer
    assert len(account.provider.requests) == 1


ODD: list[Any] = [None, 5, True, "", [], [VOICE], {}]


@pytest.mark.parametrize(
    "output", [*ODD, {"voice": VOICE}, *({"voice_id": odd} for odd in [*ODD, "x" * (MAX_VOICE_ID_CHARS + 1)])]
)
async def test_a_voice_without_a_fit_id_is_unclear(account: Account, output: object) -> None:
    account.provider.expect(gives(output))
    failure = await failure_of(account.create())
    assert type(failure) is UnclearAnswer
    assert may_have_worked(failure)
    assert len(account.provider.requests) == 1


async def test_what_cannot_be_stored_is_replaced_in_an_id(account: Account) -> None:
    account.provider.expect(gives({"voice_id": "a\x00b\ud800c\udfff"}), gives({"voice_id": "v" * MAX_VOICE_ID_CHARS}))
    assert await account.create() == "a\ufffdb\ufffdc\ufffd"
    assert len(await account.create()) == MAX_VOICE_ID_CHARS


async def test_a_voice_is_read_with_all_that_is_told(account: Account) -> None:
    account.provider.expect(gives({**GOOD["query"], "voice_id": "another", "resource_link": "l\x00", "new": [1]}))
    assert await account.query() == VoiceReport(VOICE, "OK", CREATED, MODIFIED, "cosyvoice-v3-flash", "l\ufffd")


@pytest.mark.parametrize("status", ["DEPLOYING", "OK", "UNDEPLOYED"])
async def test_every_documented_status_is_known(account: Account, status: str) -> None:
    account.provider.expect(gives({"voice_list": [{"voice_id": VOICE, **TIMES, "status": status}]}))
    assert [(voice.voice_id, voice.status) for voice in await account.find()] == [(VOICE, status)]


@pytest.mark.parametrize("status", [None, 1, True, [], {}, "", "ok", "FAILED", "OK\x00", "\ud800"])
async def test_a_voice_of_no_known_status_is_there_and_not_ready(account: Account, status: object) -> None:
    account.provider.expect(gives({**GOOD["query"], "status": status}))
    assert (await account.query()).status == "DEPLOYING"


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ("2026-01-02 03:04:05", CREATED),
        ("2026-01-02T03:04:05", CREATED),
        ("2026-01-02 03:04:05.120", CREATED + timedelta(milliseconds=120)),
        ("2026-01-02T03:04:05Z", CREATED + timedelta(hours=8)),
        ("2026-01-02T03:04:05+08:00", CREATED),
        ("2026-01-02 03:04:05-05:00", CREATED + timedelta(hours=13)),
    ],
)
def test_times_without_a_zone_are_those_of_beijing(told: str, read: datetime) -> None:
    report = read_report({"voice_id": VOICE, "status": "OK", "gmt_create": told, "gmt_modified": told})
    assert report is not None
    assert (report.created_at, report.modified_at, report.created_at.tzinfo) == (read, read, UTC)


@pytest.mark.parametrize(
    "told", [None, "", "soon", 5, 1767294245000, [], {}, "2026-13-01 00:00:00", "0001-01-01 00:00:00", "\x00", "\ud800"]
)
def test_a_voice_without_a_time_was_made_now(told: object) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    nothing = read_report({"voice_id": VOICE, "status": "OK", "gmt_create": told, "gmt_modified": told})
    once = read_report({"voice_id": VOICE, "status": "OK", **TIMES, "gmt_modified": told})
    assert nothing is not None
    assert before <= nothing.created_at == nothing.modified_at <= datetime.now(UTC)
    assert once is not None
    assert (once.created_at, once.modified_at) == (CREATED, CREATED)


async def test_entries_that_are_no_voices_are_passed_over(account: Account) -> None:
    good = {"voice_id": VOICE, "status": "OK", **TIMES}
    odd: list[Any] = [None, 5, "x", [], {}, {**good, "voice_id": None}, {**good, "voice_id": "v" * 129}]
    account.provider.expect(gives({"voice_list": [*odd, good]}))
    assert [voice.voice_id for voice in await account.find()] == [VOICE]


@pytest.mark.parametrize("output", [None, [], {}, {"voice_list": None}, {"voice_list": {}}, {"voice_list": "x"}])
async def test_an_answer_without_a_list_is_not_an_empty_list(account: Account, output: object) -> None:
    account.provider.expect(gives(output))
    assert type(await failure_of(account.find())) is UnclearAnswer


# ---- Paging


@dataclass
class Shelf:
    """A provider's voices, which it lists in its own way."""

    total: int
    clamp: int = 10_000
    overlap: int = 0
    ignores_index: bool = False
    endless: bool = False

    def list(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """The page that was asked for."""
        size = min(asked["page_size"], self.clamp)
        index = 0 if self.ignores_index else asked["page_index"]
        start = index * (size - self.overlap)
        end = start + size if self.endless else min(start + size, self.total)
        return [self._entry(number) for number in range(start, end)]

    def _entry(self, number: int) -> dict[str, Any]:
        return {"voice_id": f"cosyvoice-v2-my-{number}", "status": "OK", **TIMES}


def shelve(account: Account, shelf: Shelf) -> None:
    """Have the provider list these voices, as often as it is asked."""

    async def answer(line: Line) -> None:
        asked = account.provider.requests[-1].json["input"]
        await line.send(written({"output": {"voice_list": shelf.list(asked)}, "request_id": "r"}))

    account.provider.expect(*[answer] * (MAX_PAGES + 1))


@pytest.mark.parametrize("clamp", [10, 20, 50, 100, 10_000])
@pytest.mark.parametrize("total", [0, 1, 9, 10, 11, 99, 100, 101, 1000, 1001])
async def test_all_voices_are_found_whatever_the_page_size(account: Account, total: int, clamp: int) -> None:
    shelve(account, Shelf(total, clamp))
    found = await account.find()
    assert [voice.voice_id for voice in found] == [f"cosyvoice-v2-my-{number}" for number in range(total)]
    size = min(clamp, PAGE_SIZE)
    assert [asked["page_index"] for asked in account.asked] == list(range(len(account.asked)))
    assert len(account.asked) <= total // size + 1 + (size != PAGE_SIZE and total % size == 0) + (0 < total < size)


@pytest.mark.parametrize("total", [1, 10, 99, 100, 101])
async def test_a_provider_that_knows_no_pages_is_asked_twice_at_most(account: Account, total: int) -> None:
    shelve(account, Shelf(total, ignores_index=True))
    assert len(await account.find()) == min(total, PAGE_SIZE)
    assert len(account.asked) <= 2


@pytest.mark.parametrize("clamp", [10, 100])
async def test_a_voice_that_is_listed_twice_is_found_once(account: Account, clamp: int) -> None:
    shelve(account, Shelf(250, clamp, overlap=3))
    assert sorted(voice.voice_id for voice in await account.find()) == sorted(
        f"cosyvoice-v2-my-{number}" for number in range(250)
    )


async def test_a_list_without_end_is_given_up(account: Account) -> None:
    shelve(account, Shelf(0, endless=True, clamp=10))
    with capture_logs() as logs:
        assert type(await failure_of(account.find())) is UnclearAnswer
    assert len(account.asked) == MAX_PAGES
    assert [each["event"] for each in logs] == ["provider_voice_list_endless"]


async def test_a_page_that_fails_fails_the_list(account: Account) -> None:
    first = Shelf(PAGE_SIZE).list({"page_size": PAGE_SIZE, "page_index": 0})
    account.provider.expect(gives({"voice_list": first}), refuses("InvalidApiKey", status=401))
    assert type(await failure_of(account.find())) is InvalidApiKey


# ---- Failures

REFUSALS: list[tuple[type[AppError], int, str, str]] = [
    (VoiceNotFound, 400, "BadRequest.ResourceNotExist", "The Required resource not exist."),
    (VoiceNotFound, 416, "BadRequest.ResourceNotExist", "The Required resource not exist."),
    (VoiceLimitExceeded, 400, "Throttling.AllocationQuota", "您当前的配额为1000"),
    (VoiceLimitExceeded, 429, "Throttling.AllocationQuota", "Maximum voice-clone voice limit exceeded."),
    (InvalidAudio, 400, "BadRequest.InputDownloadFailed", "Failed to download the input file: xxx."),
    (InvalidAudio, 400, "BadRequest.UnsupportedFileFormat", "File format unsupported."),
    (InvalidAudio, 400, "Audio.AudioShortError", "valid audio too short!"),
    (InvalidAudio, 400, "Audio.AudioSilentError", "silent audio error."),
    (InvalidAudio, 430, "Audio.AudioSilentError", "Silent file unsupported."),
    (InvalidAudio, 400, "Audio.DecoderError", "Decoder audio file failed."),
    (InvalidAudio, 430, "Audio.DecoderError", "Decoder audio file failed."),
    (InvalidAudio, 430, "Audio.FileSizeExceed", "File too large"),
    (InvalidAudio, 400, "Audio.AudioRateError", "File sample rate unsupported"),
    (InvalidAudio, 430, "Audio.AudioRateError", "File sample rate unsupported"),
    (InvalidAudio, 430, "Audio.SomethingNew", "odd"),
    (InvalidAudio, 400, "InvalidParameter", "unsupported audio format:xxx"),
    (AudioTooLong, 400, "Audio.DurationLimitError", "≤ 60 s"),
    (UpstreamError, 500, "InternalError", "audio preprocess server error"),
    (UpstreamError, 500, "InternalError", "request asr failed"),
    (UpstreamError, 400, "InvalidParameter", "url error, please check url！"),
    (UpstreamError, 400, "Arrearage", "Access denied, please make sure your account is in good standing."),
    (UpstreamError, 430, "SomethingNew", "odd"),
    (InvalidModel, 404, "ModelNotFound", "Model can not be found."),
    (InvalidApiKey, 401, "InvalidApiKey", "Invalid API-key provided."),
]


@pytest.mark.parametrize(("meaning", "status", "code", "message"), REFUSALS)
async def test_a_refusal_has_one_meaning_and_ends_the_matter(
    account: Account, meaning: type[AppError], status: int, code: str, message: str
) -> None:
    account.provider.expect(refuses(code, message, status))
    failure = await failure_of(account.create())
    assert type(failure) is meaning
    assert not may_have_worked(failure)
    assert len(account.provider.requests) == 1


@pytest.mark.parametrize("name", ["query", "update", "delete"])
async def test_a_voice_that_does_not_exist_is_not_found(account: Account, name: str) -> None:
    account.provider.expect(GONE)
    assert type(await failure_of(CALLS[name](account))) is VoiceNotFound


@pytest.mark.parametrize("code", ["SomethingNew", "InvalidParameter", "InternalError", "Audio.SomethingNew"])
@pytest.mark.parametrize("start", ["https://bucket.example.com/a.wav", "HTTPS://bucket.example.com/a.wav"])
async def test_a_signature_in_what_the_provider_says_is_not_shown(account: Account, code: str, start: str) -> None:
    signed = f"{start}?Expires=17&OSSAccessKeyId=LTAI&Signature=s3cr3t%2B%3D"
    account.provider.expect(refuses(code, f"Failed to download the input file: {signed}."))
    shown = (await failure_of(account.create())).message
    assert "bucket.example.com/a.wav" in shown or code == "InternalError"
    assert not [word for word in ("s3cr3t", "LTAI", "Signature") if word in shown]


# ---- What is asked again


async def cut(line: Line) -> None:
    await line.send(written(GOOD["create"])[:-5])
    await line.reset()


BROKEN: dict[str, tuple[type[AppError], Act]] = {
    "reset": (ConnectionLost, Line.reset),
    "hung up": (ConnectionLost, Line.hang_up),
    "half an answer": (ConnectionLost, cut),
    "no HTTP": (ConnectionLost, sends(b"hello\r\n\r\n")),
    "a gateway's page": (UnclearAnswer, answers(b"<html>bad gateway</html>", 502)),
    "a gateway's time-out": (UnclearAnswer, answers(b"<html>gateway time-out</html>", 504)),
    "a time-out there": (UnclearAnswer, refuses("RequestTimeOut", "Request timed out, please try again later.", 500)),
}


@pytest.mark.parametrize(("meaning", "act"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", ["create", "update", "delete"])
async def test_what_may_have_worked_is_not_asked_again(
    account: Account, name: str, meaning: type[AppError], act: Act
) -> None:
    account.provider.expect(act)
    failure = await failure_of(CALLS[name](account))
    assert type(failure) is meaning
    assert may_have_worked(failure)
    assert len(account.provider.requests) == 1


@every_call
async def test_after_silence_nothing_is_asked_again(account: Account, name: str) -> None:
    async with account.provider.client(silence_seconds=0.1) as impatient:
        account.client = EnrollmentClient(impatient, account.take_turn)
        account.provider.expect(Line.keep_silent)
        failure = await failure_of(CALLS[name](account))
    assert type(failure) is UpstreamTimeout
    assert may_have_worked(failure)
    assert len(account.provider.requests) == 1


@pytest.mark.parametrize("act", [Line.reset, Line.hang_up, cut])
@pytest.mark.parametrize("name", ["find", "query"])
async def test_a_free_question_is_asked_again_on_a_broken_line(account: Account, name: str, act: Act) -> None:
    account.provider.expect(act, act, gives(GOOD[name]))
    await CALLS[name](account)
    assert len(account.provider.requests) == 3


@every_call
async def test_throttling_is_borne_for_a_while(account: Account, name: str) -> None:
    account.provider.expect(throttles, throttles, gives(GOOD[name]), *[throttles] * MAX_ATTEMPTS)
    await CALLS[name](account)
    failure = await failure_of(CALLS[name](account))
    assert type(failure) is Throttled
    assert failure.retry_after_seconds
    assert not may_have_worked(failure)
    assert len(account.provider.requests) == 3 + MAX_ATTEMPTS


@every_call
async def test_a_refused_connection_is_tried_again_and_never_counts_as_work(account: Account, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    account.credential = replace(account.credential, http_url=f"http://127.0.0.1:{port}/api/v1")
    with capture_logs() as logs:
        failure = await failure_of(CALLS[name](account))
    assert type(failure) is Unreachable
    assert not may_have_worked(failure)
    assert len([each for each in logs if each["event"] == "provider_retry"]) == MAX_ATTEMPTS - 1
