"""Cloned voices once they are there: spec 3.2 to 3.5, and what a voice that is not ready says to a synthesis."""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cloning import (
    FLASH,
    LIST,
    PLUS,
    PUBLIC_SAMPLE,
    V2,
    asked,
    clone,
    clone_file,
    fault,
    ids,
    let_a_minute_pass,
    listed,
    look,
    made,
    no_more_than,
    path_of,
    removed,
    rounds,
    sample,
    sample_of,
    samples_of,
    struck,
)
from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import data_of, refusal
from tests.servers import Sandbox, Server, run_backend, run_special_sandbox

LIST_SECONDS = 0.25  # a tenth of a second on a machine that does nothing else


async def test_a_thousand_voices_are_paged_filtered_and_quick(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    key = account.api_key
    voices = sandbox.add_voices(key, PLUS, "older", count=400) + sandbox.add_voices(key, FLASH, "newer", count=599)
    voices += sandbox.add_voices(key, FLASH, "older")
    newest_first = voices[::-1]
    pages = [await listed(account, page=page, page_size=300) for page in range(5)]
    assert [(page["total"], len(page["voices"])) for page in pages] == [
        (1000, 300), (1000, 300), (1000, 300), (1000, 100), (1000, 0),
    ]  # fmt: skip
    told = [voice for page in pages for voice in page["voices"]]
    assert sorted(voice["voice_id"] for voice in told) == sorted(voices)
    assert told == sorted(told, key=lambda voice: voice["gmt_create"], reverse=True)
    assert {(voice["target_model"], voice["status"]) for voice in told} == {(FLASH, "OK"), (PLUS, "OK")}
    by_hundred = [voice for page in range(10) for voice in await ids(account, page=page, page_size=100)]
    assert by_hundred == [voice["voice_id"] for voice in told]
    assert await ids(account) == by_hundred[:10]
    for filters, chosen in (
        ({"prefix": "older"}, [voice for voice in newest_first if "-older-" in voice]),
        ({"model": PLUS}, [voice for voice in newest_first if voice.startswith(PLUS)]),
        ({"prefix": "older", "model": FLASH}, newest_first[:1]),
        ({"model": V2}, []),
        ({"prefix": "old"}, []),
    ):
        page = await listed(account, page_size=1000, **filters)
        assert page["total"] == len(chosen)
        assert {voice["voice_id"] for voice in page["voices"]} == set(chosen)
        assert (await listed(account, page=1, page_size=300, **filters))["total"] == len(chosen)
    spans = []
    for number in range(9):
        started = time.monotonic()
        await account.client.get(LIST, params={"page": number * 10, "page_size": 10, "prefix": "older"})
        spans.append(time.monotonic() - started)
    assert statistics.median(spans) < LIST_SECONDS, spans
    assert rounds(sandbox, account) == 1

    before = samples_of(backend)
    answer = await clone_file(account, prefix="toomuch")
    assert refusal(answer) == (400, "VOICE_LIMIT_EXCEEDED")
    assert "1000" in answer.json()["message"]
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")
    assert samples_of(backend) - before <= {sample_of(backend, account)}
    data_of(await account.client.delete(path_of(voices[0])))
    assert (await listed(account))["total"] == 999
    made_now = await made(account, prefix="fits")
    assert (await ids(account))[0] == made_now
    assert (await listed(account))["total"] == 1000


async def test_wrong_pages_are_refused_and_unknown_models_are_empty(account: Account, sandbox: Sandbox) -> None:
    for query in ({"page": -1}, {"page": "x"}, {"page_size": 0}, {"page_size": 1001}, {"page_size": "ten"}):
        answer = await account.client.get(LIST, params=query)
        assert refusal(answer) == (400, "INVALID_REQUEST")
        assert next(iter(query)) in answer.json()["message"]
    assert sandbox.requests(account.api_key) == []
    [voice] = sandbox.add_voices(account.api_key)
    assert await ids(account, page_size=1000) == [voice]
    assert await listed(account, model="whisper-1") == {"total": 0, "voices": []}
    assert await ids(account, prefix="", model="") == [voice]


async def test_one_round_a_minute_serves_everybody_with_the_key(
    account: Account, sandbox: Sandbox, backend: Server, create_account: CreateAccount
) -> None:
    [first] = sandbox.add_voices(account.api_key)
    twin = await create_account(backend, api_key=account.api_key)
    pages = await asyncio.gather(*(listed(each) for each in (account, twin) for _ in range(10)))
    assert all([voice["voice_id"] for voice in page["voices"]] == [first] for page in pages)
    assert rounds(sandbox, account) == 1
    [second] = sandbox.add_voices(account.api_key, V2)
    [gone] = sandbox.add_voices(account.api_key, PLUS, status="UNDEPLOYED")
    assert await ids(twin) == [first]
    let_a_minute_pass(backend)
    told = (await listed(account))["voices"]
    assert {(voice["voice_id"], voice["target_model"], voice["status"]) for voice in told} == {
        (first, FLASH, "OK"),
        (second, V2, "OK"),
        (gone, PLUS, "UNDEPLOYED"),
    }
    assert rounds(sandbox, account) == 2
    delete_elsewhere(sandbox, account, gone)
    # What was made a moment ago may only be missing because the provider's list lags behind.
    rows(backend, "UPDATE voices SET created_at = '2026-01-01 00:00:00.000000'")
    let_a_minute_pass(backend)
    assert sorted(await ids(twin)) == sorted([first, second])
    assert rounds(sandbox, account) == 3


def delete_elsewhere(sandbox: Sandbox, account: Account, voice_id: str) -> None:
    """Delete a voice at the provider as its console would."""
    body = {"model": "voice-enrollment", "input": {"action": "delete_voice", "voice_id": voice_id}}
    headers = {"Authorization": f"Bearer {account.api_key}"}
    url = f"{sandbox.http_url}/services/audio/tts/customization"
    httpx.post(url, json=body, headers=headers).raise_for_status()


async def test_a_list_that_fails_is_told_and_asked_for_again(account: Account, sandbox: Sandbox) -> None:
    [voice] = sandbox.add_voices(account.api_key)
    with sandbox.faults(**fault("list_voice", status=503, code="ServiceUnavailable")):
        answer = await account.client.get(LIST)
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    with sandbox.faults(**fault("list_voice", how="close", count=1)):
        assert await ids(account) == [voice]


async def test_what_we_did_is_right_at_once_although_the_providers_list_lags_behind(
    tmp_path: Path, create_account: CreateAccount
) -> None:
    with (
        run_special_sandbox(tmp_path / "sandbox", list_lag_seconds=600.0, voice_seconds=0.4) as lagging,
        run_backend(tmp_path / "first", lagging.settings) as first,
    ):
        second_settings = {**lagging.settings, "DATA_DIR": str(first.folder / "data"), "RATE_LIMIT": "12/minute"}
        with run_backend(tmp_path / "second", second_settings) as second:
            account = await create_account(first)
            assert await ids(account) == []
            kept, deleted = await made(account), await made(account, target_model=PLUS)
            data_of(await account.client.delete(path_of(deleted)))
            for server in (first, second, first, second):
                account.client.base_url = httpx.URL(server.url)
                assert await ids(account) == [kept]
                let_a_minute_pass(server if server is first else first)
            assert rounds(lagging, account) == 4
            account.client.base_url = httpx.URL(second.url)
            assert (await look(account, kept, wait=10))["status"] == "OK"
            assert [voice["status"] for voice in (await listed(account))["voices"]] == ["OK"]
            data_of(await account.client.put(path_of(kept), json={"audio_url": PUBLIC_SAMPLE}))
            [updated] = (await listed(account))["voices"]
            assert updated["status"] == "DEPLOYING"
            assert refusal(await account.synthesize("你好。", voice=kept)) == (400, "INVALID_VOICE")
            assert (await look(account, kept, wait=10))["status"] == "OK"
            assert (await account.synthesize("你好。", voice=kept)).status_code == 200
            answers = [await account.client.get(LIST) for _ in range(25)]
            [refused, *_] = [answer for answer in answers if answer.status_code != 200]
            assert refusal(refused) == (429, "RATE_LIMITED")
            assert int(refused.headers["retry-after"]) >= 1
            assert "Traceback" not in first.log + second.log


WRONG_METHODS = [
    (method, name)
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    for name in ("system", "list", "create")
    if (method, name) not in {("GET", "system"), ("GET", "list"), ("POST", "create")}
]


async def test_names_of_routes_are_no_voices(account: Account, sandbox: Sandbox) -> None:
    for method, name in WRONG_METHODS:
        for arguments in ({}, {"json": {"audio_url": PUBLIC_SAMPLE}}, {"files": {"file": ("a.wav", sample())}}):
            answer = await account.client.request(method, path_of(name), **arguments)
            assert answer.status_code == 405, (method, name)
            assert answer.json().keys() == {"code", "message", "data", "error"}
    assert sandbox.requests(account.api_key) == []


async def test_a_refused_method_comes_with_those_that_are_allowed(account: Account) -> None:
    told = {(method, name): await account.client.request(method, path_of(name)) for method, name in WRONG_METHODS}
    assert {each: answer.headers.get("allow") for each, answer in told.items()} == {
        (method, name): "POST" if name == "create" else "GET" for method, name in WRONG_METHODS
    }


async def test_what_cannot_be_a_cloned_voice_is_not_found_without_asking(account: Account, sandbox: Sandbox) -> None:
    for name in ("longanyang", "a%00b", "%FF", "%E6%88%91", "a%20b", "..%5Cx", "-x", "x" * 129, "%2e%2e"):
        for method, arguments in (
            ("GET", {}),
            ("PUT", {"json": {"audio_url": PUBLIC_SAMPLE}}),
            ("DELETE", {}),
        ):
            answer = await account.client.request(method, path_of(name), **arguments)  # type: ignore[arg-type]
            assert answer.status_code == 404, (name, method, answer.text)
            assert answer.json()["code"] == 404
    assert sandbox.requests(account.api_key) == []
    unknown = path_of(f"{FLASH}-mine-{'0' * 32}")
    assert refusal(await account.client.get(unknown)) == (404, "VOICE_NOT_FOUND")


async def test_a_voice_speaks_only_with_its_own_model_and_once_it_is_ready(account: Account, sandbox: Sandbox) -> None:
    key = account.api_key
    [ready], [waiting], [rejected] = (
        sandbox.add_voices(key, PLUS, status=s) for s in ("OK", "DEPLOYING", "UNDEPLOYED")
    )
    assert (await listed(account))["total"] == 3
    requests = len(sandbox.requests(key))
    for fields, error, part in (
        ({"voice": ready}, "MODEL_VOICE_MISMATCH", "model"),
        ({"voice": ready, "model": V2, "stream": True}, "MODEL_VOICE_MISMATCH", "model"),
        ({"voice": waiting, "model": PLUS}, "INVALID_VOICE", "DEPLOYING"),
        ({"voice": waiting, "model": PLUS, "stream": True}, "INVALID_VOICE", "DEPLOYING"),
        ({"voice": rejected, "model": PLUS}, "INVALID_VOICE", "UNDEPLOYED"),
    ):
        answer = await account.synthesize("你好。", **fields)
        assert refusal(answer) == (400, error)
        assert part in answer.json()["message"]
    assert sandbox.calls(key) == []
    assert len(sandbox.requests(key)) == requests
    assert (await account.history())["total"] == 0
    assert (await account.synthesize("你好。", voice=ready, model=PLUS)).status_code == 200


async def test_a_voice_that_nobody_listed_yet_is_known_by_its_id(account: Account, sandbox: Sandbox) -> None:
    [voice] = sandbox.add_voices(account.api_key, PLUS)
    assert refusal(await account.synthesize("你好。", voice=voice)) == (400, "MODEL_VOICE_MISMATCH")
    assert sandbox.calls(account.api_key) == []
    assert (await account.synthesize("你好。", voice=voice, model=PLUS)).status_code == 200


async def test_many_who_wait_for_a_voice_cost_one_query_a_second(account: Account, sandbox: Sandbox) -> None:
    [voice] = sandbox.add_voices(account.api_key, status="DEPLOYING")
    await asyncio.gather(*(account.client.get("/health/live") for _ in range(20)))  # they are to come together
    started = time.monotonic()
    told = await asyncio.gather(*(look(account, voice, wait=2) for _ in range(20)))
    seconds = time.monotonic() - started
    assert {each["status"] for each in told} == {"DEPLOYING"}
    assert 2 <= seconds < 4
    assert len(asked(sandbox, account)) <= seconds + 2
    for wait in ("-1", "301", "x", "1.5"):
        assert refusal(await account.client.get(path_of(voice), params={"wait": wait})) == (400, "INVALID_REQUEST")


async def test_waiting_ends_as_soon_as_the_voice_is_ready(account: Account) -> None:
    for prefix, status in (("mine", "OK"), ("rejected", "UNDEPLOYED")):
        started = time.monotonic()
        voice = await made(account, prefix=prefix)
        told = await asyncio.gather(*(look(account, voice, wait=60) for _ in range(5)))
        assert {each["status"] for each in told} == {status}
        assert time.monotonic() - started < 6
        started = time.monotonic()
        assert (await look(account, voice, wait=60))["status"] == status
        assert time.monotonic() - started < 1.5


async def test_a_client_that_hangs_up_ends_its_waiting(account: Account, sandbox: Sandbox, backend: Server) -> None:
    [voice] = sandbox.add_voices(account.api_key, status="DEPLOYING")
    log_before = len(backend.log)
    with pytest.raises(httpx.ReadTimeout):
        await account.client.get(path_of(voice), params={"wait": 60}, timeout=0.3)
    async with asyncio.timeout(5):
        while '"status": 499' not in backend.log[log_before:]:
            await asyncio.sleep(0.02)
    queries = len(asked(sandbox, account))
    await asyncio.sleep(1.5)  # a waiter would have asked again
    assert len(asked(sandbox, account)) == queries == 1
    assert "Traceback" not in backend.log[log_before:]


@pytest.mark.parametrize("how", ["close", "close_after"])
@pytest.mark.parametrize("status", ["OK", "DEPLOYING"])
async def test_an_update_whose_answer_is_lost_is_brought_to_its_end(
    account: Account, sandbox: Sandbox, backend: Server, how: str, status: str
) -> None:
    voice = data_of(await clone_file(account))["voice_id"]
    first = sample_of(backend, account)
    assert (await look(account, voice, wait=20 if status == "OK" else 0))["status"] == status
    with sandbox.faults(**fault("update_voice", how=how, count=1)):
        answer = await account.client.put(path_of(voice), files={"file": ("new.wav", sample(7))})
    assert data_of(answer) == {"voice_id": voice, "status": "DEPLOYING"}
    assert [each["sample"]["bytes"] for each in sandbox.voices(account.api_key)] == [len(sample(7))]
    assert [each["status"] for each in (await listed(account))["voices"]] == ["DEPLOYING"]
    await removed(backend, first)
    kept = sample_of(backend, account)
    assert kept is not None
    assert kept.read_bytes() == sample(7)


@pytest.mark.parametrize("status", ["OK", "DEPLOYING"])
async def test_an_update_that_fails_is_told_and_the_old_sample_stays(
    account: Account, sandbox: Sandbox, backend: Server, status: str
) -> None:
    voice = data_of(await clone_file(account))["voice_id"]
    first = sample_of(backend, account)
    assert first is not None
    assert (await look(account, voice, wait=20 if status == "OK" else 0))["status"] == status
    trouble: dict[str, Any]
    for trouble, code, error in (
        ({"status": 503, "code": "ServiceUnavailable"}, 502, "UPSTREAM_ERROR"),
        ({"status": 430, "code": "Audio.AudioSilentError"}, 400, "INVALID_AUDIO"),
    ):
        before = samples_of(backend)
        with sandbox.faults(**fault("update_voice", **trouble)):
            answer = await account.client.put(path_of(voice), files={"file": ("new.wav", sample(7))})
        assert refusal(answer) == (code, error)
        await no_more_than(backend, before)
    assert len(asked(sandbox, account, "update_voice")) == 2
    for trouble in ({"how": "close"}, {"status": 500, "body": "<html>oops</html>"}):
        with sandbox.faults(**fault("update_voice", **trouble)):
            answer = await account.client.put(path_of(voice), files={"file": ("new.wav", sample(7))})
        assert refusal(answer) == (502, "UPSTREAM_ERROR")
    assert [each["sample"]["bytes"] for each in sandbox.voices(account.api_key)] == [len(sample())]
    assert first.read_bytes() == sample()
    await listed(account)
    assert (await look(account, voice, wait=20))["status"] == "OK"


async def test_updates_are_held_to_the_same_rules(account: Account, sandbox: Sandbox, backend: Server) -> None:
    [voice] = sandbox.add_voices(account.api_key)
    path = path_of(voice)
    for arguments, error in (
        ({"json": {}}, "INVALID_REQUEST"),
        ({"json": {"audio_url": ""}}, "INVALID_REQUEST"),
        ({"data": {"audio_url": PUBLIC_SAMPLE}, "files": {"file": ("a.wav", sample())}}, "INVALID_REQUEST"),
        ({"files": {"file": ("a.wav", b"x" * 100)}}, "INVALID_AUDIO"),
        ({"content": b"x"}, "INVALID_REQUEST"),
    ):
        answer = await account.client.put(path, **arguments)
        assert refusal(answer) == (400, error), answer.text
    assert sandbox.requests(account.api_key) == []
    assert sample_of(backend, account) is None
    with sandbox.faults(**fault("update_voice", status=429, code="Throttling.RateQuota", count=1)):
        data_of(await account.client.put(path, json={"audio_url": PUBLIC_SAMPLE}))
    assert [each["status"] for each in asked(sandbox, account, "update_voice")] == [429, 200]
    assert (await account.history())["total"] == 0


@pytest.mark.parametrize(
    ("trouble", "is_gone"),
    [
        ({"how": "close_after", "count": 1}, True),
        ({"how": "close", "count": 1}, True),
        ({"status": 502, "body": "<html/>", "count": 1}, True),
        ({"status": 429, "code": "Throttling.RateQuota", "count": 1}, True),
        ({"status": 503, "code": "ServiceUnavailable"}, False),
        ({"how": "close"}, False),
    ],
)
async def test_a_delete_that_stumbles_is_brought_to_its_end_or_told(
    account: Account, sandbox: Sandbox, backend: Server, trouble: dict[str, Any], is_gone: bool
) -> None:
    voice = data_of(await clone_file(account))["voice_id"]
    kept = sample_of(backend, account)
    with sandbox.faults(**fault("delete_voice", **trouble)):
        answer = await account.client.delete(path_of(voice))
    if is_gone:
        assert data_of(answer) is None
        assert sandbox.voices(account.api_key) == []
        await removed(backend, kept)
        assert await ids(account) == []
    else:
        assert refusal(answer) == (502, "UPSTREAM_ERROR")
        assert await ids(account) == [voice]
        assert sample_of(backend, account) == kept
        data_of(await account.client.delete(path_of(voice)))
    assert refusal(await account.client.delete(path_of(voice))) == (404, "VOICE_NOT_FOUND")
    assert await ids(account) == []


async def test_twins_who_delete_at_once_are_told_the_truth(account: Account, sandbox: Sandbox) -> None:
    [voice] = sandbox.add_voices(account.api_key)
    answers = await asyncio.gather(*(account.client.delete(path_of(voice)) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 404, 404, 404]
    assert sandbox.voices(account.api_key) == []


async def test_a_client_that_hangs_up_has_its_voice_deleted_all_the_same(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    voice = data_of(await clone_file(account))["voice_id"]
    kept = sample_of(backend, account)
    with sandbox.faults(**fault("delete_voice", how="delay", seconds=0.6)):
        with pytest.raises(httpx.ReadTimeout):
            await account.client.delete(path_of(voice), timeout=0.3)
        await struck(sandbox, account, "delete_voice")
        await removed(backend, kept)
    assert await ids(account) == []
    answer = await clone(account, prefix="again")
    assert answer.status_code == 200
