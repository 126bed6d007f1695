"""Making voices of recorded samples: spec 3.1, and what becomes of the samples."""

import asyncio
import json
import re
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cloning import (
    CREATE,
    FLASH,
    LIST,
    PLUS,
    PUBLIC_SAMPLE,
    REJECTED_SAMPLE,
    V2,
    asked,
    clone,
    clone_file,
    fault,
    ids,
    item_of,
    item_with,
    listed,
    look,
    made,
    no_more_than,
    path_of,
    removed,
    sample,
    sample_of,
    samples_of,
)
from tests.conftest import Account, CreateAccount
from tests.databases import rows, written
from tests.hearing import data_of, recognize, refusal, speak, tone, transcribe
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend
from tests.sound import decode, loudness
from tests.test_deployments import oss_settings
from tests.test_recordings import encode
from tests.test_uploads import LOCAL_URLS, PNG

SENTENCE = "今天天气真好，我们一起去公园散步吧，然后再去湖边看看荷花，最后回家吃饭。"
MEGABYTE = 1024 * 1024
VOICE_ID = re.compile(rf"{FLASH}-mine-[0-9a-f]+")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


async def nothing_happened(account: Account, sandbox: Sandbox, backend: Server) -> None:
    """What was refused left neither a record, a sample nor a trace at the provider."""
    assert sandbox.requests(account.api_key) == []
    assert (await account.history())["total"] == 0
    assert sample_of(backend, account) is None


@pytest.mark.parametrize("by", ["file", "url"])
async def test_a_voice_lives_from_its_sample_to_its_end(
    account: Account, backend: Server, sandbox: Sandbox, create_account: CreateAccount, by: str
) -> None:
    url, audio = await speak(account, SENTENCE, format="wav" if by == "file" else "mp3")
    answer = await (clone_file(account, audio, "我的 \u202e录音.mp3") if by == "file" else clone(account, url))
    assert (answer.json()["code"], answer.json()["message"]) == (200, "success")
    created = data_of(answer)
    voice_id, record_id = created["voice_id"], created["record_id"]
    assert created == {"voice_id": voice_id, "status": "DEPLOYING", "target_model": FLASH, "record_id": record_id}
    assert VOICE_ID.fullmatch(voice_id)
    assert type(record_id) is int
    assert await ids(account) == [voice_id]

    asking = await account.synthesize("你好。", voice=voice_id)
    assert refusal(asking) == (400, "INVALID_VOICE")
    assert "DEPLOYING" in asking.json()["message"]
    told = await look(account, voice_id, wait=20)
    assert told.keys() == {"voice_id", "status", "target_model", "resource_link", "gmt_create", "gmt_modified"}
    assert (told["voice_id"], told["status"], told["target_model"]) == (voice_id, "OK", FLASH)
    assert httpx.get(told["resource_link"]).content == audio
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", told["gmt_create"])
    spoken = data_of(await account.synthesize("用我的声音说话。", voice=voice_id, format="wav"))
    samples, rate = decode((await account.client.get(spoken["audio_url"])).content, "wav", 22050)
    assert len(samples) / rate > 0.5
    assert loudness(samples) > 100

    filters: dict[str, Any]
    for filters in ({}, {"prefix": "mine"}, {"model": FLASH}, {"prefix": "mine", "model": FLASH}):
        assert (await listed(account, **filters))["voices"] == [
            {name: value for name, value in told.items() if name != "resource_link"}
        ]
    for filters in ({"prefix": "min"}, {"model": PLUS}, {"prefix": "mine", "model": V2}, {"page": 1}):
        assert (await listed(account, **filters))["voices"] == []
    await strangers_see_nothing(await create_account(backend), backend, account, voice_id)

    first = sample_of(backend, account)
    renewing = {"files": {"file": ("new.wav", sample(7))}} if by == "file" else {"json": {"audio_url": PUBLIC_SAMPLE}}
    updated = data_of(await account.client.put(path_of(voice_id), **renewing))
    assert updated == {"voice_id": voice_id, "status": "DEPLOYING"}
    assert [voice["status"] for voice in (await listed(account))["voices"]] == ["DEPLOYING"]
    assert (await item_of(account, record_id))["status"] == "DEPLOYING"
    await removed(backend, first)
    assert (await look(account, voice_id, wait=20))["status"] == "OK"
    [renewed] = sandbox.voices(account.api_key)
    assert renewed["sample"]["url" if by == "url" else "bytes"] == (PUBLIC_SAMPLE if by == "url" else len(sample(7)))
    second = sample_of(backend, account)
    assert (second is None) == (by == "url")

    deleted = await account.client.delete(path_of(voice_id))
    assert deleted.json() == {"code": 200, "message": "success", "data": None}
    assert await listed(account) == {"total": 0, "voices": []}
    assert sandbox.voices(account.api_key) == []
    if second:
        await removed(backend, second)
    for gone_for in (account.client.get, account.client.delete):
        assert refusal(await gone_for(path_of(voice_id))) == (404, "VOICE_NOT_FOUND")
    assert refusal(await account.synthesize("你好。", voice=voice_id)) == (400, "INVALID_VOICE")
    assert (await item_of(account, record_id))["voice_id"] == voice_id


async def strangers_see_nothing(stranger: Account, backend: Server, owner: Account, voice_id: str) -> None:
    """Somebody with another key can neither see, use, change nor delete a voice, nor hear its sample."""
    assert await listed(stranger) == {"total": 0, "voices": []}
    path = path_of(voice_id)
    for answer in (
        await stranger.client.get(path),
        await stranger.client.get(path, params={"wait": 5}),
        await stranger.client.put(path, json={"audio_url": PUBLIC_SAMPLE}),
        await stranger.client.put(path, files={"file": ("a.wav", sample())}),
        await stranger.client.delete(path),
    ):
        assert refusal(answer) == (404, "VOICE_NOT_FOUND"), answer.text
    assert refusal(await stranger.synthesize("你好。", voice=voice_id)) == (400, "INVALID_VOICE")
    assert (await look(owner, voice_id))["status"] == "OK"
    kept = sample_of(backend, owner)
    assert kept is not None
    assert sample_of(backend, stranger) is None
    url = f"{backend.url}/media/{kept.relative_to(backend.folder / 'data' / 'media')}"
    for anybody in (stranger, owner):
        for answer in (
            await anybody.client.get(url),
            await anybody.client.head(url),
            await anybody.client.get(url.replace("/voice/", "/%76oice/")),
            await anybody.client.get(url.replace("/audio/", "/tts/../audio/")),
        ):
            assert answer.status_code == 404
            assert not answer.headers["content-type"].startswith("audio")
        for answer in (
            await recognize(anybody, audio_url=url),
            await transcribe(anybody, url),
            await clone(anybody, url),
            await anybody.client.put(path, json={"audio_url": url}),
        ):
            assert refusal(answer) == (400, "INVALID_AUDIO")
            assert CHINESE.search(answer.json()["message"])


async def test_a_voice_in_the_history_is_as_in_the_spec(account: Account, backend: Server) -> None:
    fields = {"prefix": "My_Voice1", "target_model": PLUS, "language_hints": "en, fr，ja"}
    created = data_of(await clone_file(account, sample(), "../a\\录音.wav", **fields))
    item = await item_with(account, "OK")
    assert item.keys() == {"id", "type", "model_name", "input_data", "voice_id", "status", "bill", "created_at"}
    assert (item["id"], item["type"], item["model_name"]) == (created["record_id"], "voice", PLUS)
    assert (item["voice_id"], item["bill"]) == (created["voice_id"], "0")
    assert json.loads(item["input_data"]) == {
        "prefix": "My_Voice1",
        "file": "录音.wav",
        "language_hints": ["en", "fr", "ja"],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", item["created_at"])
    detail = data_of(await account.client.get(f"/api/audio/records/{item['id']}"))
    assert {name: detail[name] for name in item} == item
    assert detail.keys() - item.keys() <= {"finished_at", "usage"}
    assert rows(backend, "SELECT quantity, amount FROM bills WHERE record_id = ?", item["id"]) in ([], [(0, 0)])
    assert (await account.history(type="voice"))["total"] == 1
    assert (await account.history(type="tts"))["total"] == 0


async def test_every_field_reaches_the_provider_and_the_sample_by_a_temporary_upload(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    before = samples_of(backend)
    data_of(await clone(account, target_model=V2, prefix="a_B_1", language_hints=["ko", "zh"]))
    assert samples_of(backend) == before
    url = f"{PUBLIC_SAMPLE}?Expires=1&Signature=a%2Bb%3D&x=%7e"
    data_of(await clone(account, url, language_hints=None))
    data_of(await clone_file(account, language_hints="ru"))
    data_of(await clone_file(account, sample(8), language_hints=""))
    first, second, third, fourth = [each["input"] for each in asked(sandbox, account, "create_voice")]
    common = {"action": "create_voice", "target_model": FLASH, "prefix": "mine"}
    hints = {"language_hints": ["ko", "zh"]}
    assert first == {**common, "target_model": V2, "prefix": "aB1", "url": PUBLIC_SAMPLE, **hints}
    assert second == {**common, "url": url}
    assert third == {**common, "url": third["url"], "language_hints": ["ru"]}
    assert fourth == {**common, "url": fourth["url"]}
    assert fourth["url"].startswith("oss://")
    request = asked(sandbox, account, "create_voice")[3]
    assert (request["audio_source"], request["audio_bytes"]) == ("oss", len(sample(8)))
    assert request["headers"]["x-dashscope-ossresourceresolve"] == "enable"
    new = samples_of(backend) - before
    assert sorted(file.read_bytes() for file in new) == sorted([sample(), sample(8)])
    for file in new:
        key = file.relative_to(backend.folder / "data" / "media").as_posix()
        assert re.fullmatch(r"audio/voice/20\d{6}/[0-9a-f-]{36}\.wav", key)
        uuid.UUID(file.stem)
    assert (await ids(account, prefix="a_B_1")) == (await ids(account, prefix="aB1"))
    assert len(await ids(account, prefix="aB1")) == 1
    assert await ids(account, prefix="___") == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"target_model": "whisper-1"}, "INVALID_MODEL", "whisper-1"),
    ({"target_model": "qwen3-asr-flash"}, "INVALID_MODEL", "qwen3-asr-flash"),
    ({"target_model": None}, "INVALID_REQUEST", "target_model"),
    ({"target_model": ""}, "INVALID_MODEL", "模型"),
    ({"target_model": 5}, "INVALID_REQUEST", "target_model"),
    ({"prefix": None}, "INVALID_REQUEST", "prefix"),
    ({"prefix": ""}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "____"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "elevenchars"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "my-voice"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "my voice"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "我的声音"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "voice１"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": "voice\n"}, "INVALID_REQUEST", "prefix"),
    ({"prefix": 123}, "INVALID_REQUEST", "prefix"),
    ({"language_hints": ["klingon"]}, "INVALID_REQUEST", "language_hints"),
    ({"language_hints": [5]}, "INVALID_REQUEST", "language_hints"),
    ({"language_hints": {"en": 1}}, "INVALID_REQUEST", "language_hints"),
    ({"audio_url": 5}, "INVALID_REQUEST", "audio_url"),
    ({"audio_url": None}, "INVALID_REQUEST", "audio_url"),
    ({"audio_url": ""}, "INVALID_REQUEST", "audio_url"),
]


async def test_what_is_wrong_is_refused_before_the_provider_is_asked(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    for fields, error, part in WRONG:
        answer = await clone(account, **{"audio_url": PUBLIC_SAMPLE, **fields})
        assert refusal(answer) == (400, error), fields
        assert part in answer.json()["message"], fields
        assert CHINESE.search(answer.json()["message"]), fields
    await nothing_happened(account, sandbox, backend)


async def test_forms_are_held_to_the_same_rules(account: Account, sandbox: Sandbox, backend: Server) -> None:
    for answer, error, part in (
        (await clone_file(account, prefix="my-voice"), "INVALID_REQUEST", "prefix"),
        (await clone_file(account, prefix=""), "INVALID_REQUEST", "prefix"),
        (await clone_file(account, language_hints="en,xx"), "INVALID_REQUEST", "language_hints"),
        (await clone_file(account, target_model="whisper-1"), "INVALID_MODEL", "whisper-1"),
        (await clone_file(account, audio_url=PUBLIC_SAMPLE), "INVALID_REQUEST", "audio_url"),
        (await account.client.post(CREATE, data={"target_model": FLASH, "prefix": "a"}), "INVALID_REQUEST", "json"),
        (await account.client.post(CREATE, files={"prefix": (None, "a")}), "INVALID_REQUEST", "target_model"),
        (
            await account.client.post(CREATE, files={"target_model": (None, FLASH), "prefix": (None, "a")}),
            "INVALID_REQUEST",
            "file",
        ),
        (
            await account.client.post(
                CREATE, content=b"x" * (12 * MEGABYTE), headers={"Content-Type": "application/json"}
            ),
            "INVALID_AUDIO",
            "MB",
        ),
    ):
        assert refusal(answer) == (400, error), answer.text
        assert part in answer.json()["message"]
        assert CHINESE.search(answer.json()["message"])
    await nothing_happened(account, sandbox, backend)


async def test_samples_that_are_not_fit_are_refused_with_the_reason(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    for name, content, part in (
        ("short.wav", tone(3, rate=16000), "3.0 秒"),
        ("long.wav", tone(61, rate=16000), "60 秒"),
        ("silent.wav", tone(6, rate=16000, channels="s"), "没有声音"),
        ("phone.wav", tone(6, rate=8000), "8000 Hz"),
        ("empty.wav", b"", "0 字节"),
        ("picture.wav", PNG, "音频"),
        ("speech.mp3", encode("libopus", "ogg", 48000, seconds=6), "Ogg"),
        ("speech.wav", encode("flac", "flac", 16000, seconds=6), "FLAC"),
        ("large.wav", tone(55, rate=48000, channels="tt") + bytes(MEGABYTE // 4), "10 MB"),
    ):
        answer = await clone_file(account, content, name)
        assert refusal(answer) == (400, "INVALID_AUDIO"), name
        assert part in answer.json()["message"], answer.text
    url, _ = await speak(account, "你好。")
    short = await clone(account, url)
    assert refusal(short) == (400, "INVALID_AUDIO")
    assert "5 秒" in short.json()["message"]
    assert asked(sandbox, account) == []
    assert (await account.history(type="voice"))["total"] == 0
    assert sample_of(backend, account) is None


async def test_the_content_decides_and_not_the_name(account: Account, sandbox: Sandbox) -> None:
    kinds = {
        "mp3": encode("libmp3lame", "mp3", 16000, seconds=6),
        "m4a": encode("aac", "ipod", 16000, seconds=6),
        "wav": sample(),
    }
    wrong_names = ["sample.wav", "sample.txt", "sample.m4a"]
    for content, name in zip(kinds.values(), wrong_names, strict=True):
        data_of(await clone_file(account, content, name))
    voices = sandbox.voices(account.api_key)
    assert [(voice["sample"]["format"], voice["sample"]["bytes"]) for voice in voices] == [
        (kind, len(content)) for kind, content in kinds.items()
    ]
    for request, kind in zip(asked(sandbox, account, "create_voice"), kinds, strict=True):
        assert request["input"]["url"].endswith(f".{kind}")


async def test_addresses_that_are_not_public_are_refused(account: Account, sandbox: Sandbox, backend: Server) -> None:
    voice_id = f"{FLASH}-mine-{'0' * 32}"
    for url in (*LOCAL_URLS, f"{backend.url}/metrics", f"{backend.url}/media/../api/user/me"):
        for answer in (await clone(account, url), await account.client.put(path_of(voice_id), json={"audio_url": url})):
            assert refusal(answer) == (400, "INVALID_REQUEST"), url
            assert "audio_url" in answer.json()["message"]
            assert "secret" not in answer.text
    gone_url = f"{backend.url}/media/audio/tts/20260101/{uuid.uuid4()}.wav"
    assert refusal(await clone(account, gone_url)) == (400, "INVALID_AUDIO")
    await nothing_happened(account, sandbox, backend)


async def test_a_login_a_key_and_a_good_key_are_needed(backend: Server, create_account: CreateAccount) -> None:
    keyless, wrong = await asyncio.gather(
        create_account(backend, api_key=None), create_account(backend, api_key=f"sk-bad-{uuid.uuid4().hex}")
    )
    stranger = await create_account(backend)
    del stranger.client.headers["Authorization"]
    for account, expected in (
        (keyless, (403, "NO_API_KEY")),
        (wrong, (401, "UNAUTHORIZED")),
        (stranger, (401, "UNAUTHORIZED")),
    ):
        path = path_of(f"{FLASH}-mine-{'0' * 32}")
        answers = [
            await clone(account),
            await clone_file(account),
            await account.client.get(LIST),
            await account.client.get(path),
            await account.client.put(path, json={"audio_url": PUBLIC_SAMPLE}),
            await account.client.delete(path),
        ]
        assert [refusal(answer) for answer in answers] == [expected] * len(answers)
    assert answers[0].json()["message"] != (await clone(wrong)).json()["message"]
    assert (await clone(keyless)).json()["message"] == "未配置API密钥，请在用户设置中配置apikey"
    assert (await keyless.history())["total"] == 0
    assert {(item["status"], item["bill"]) for item in (await wrong.history())["items"]} <= {("failed", "0")}
    assert sample_of(backend, wrong) is None


async def test_a_refusal_of_the_provider_is_explained_and_removes_the_sample(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    before = samples_of(backend)
    cases = (
        (430, "Audio.AudioSilentError", "Silent file unsupported.", 400, "INVALID_AUDIO", "没有声音"),
        (400, "Audio.DurationLimitError", "Audio duration exceeds 60s.", 400, "AUDIO_TOO_LONG", "时长"),
        (400, "BadRequest.InputDownloadFailed", "Failed to download: x.", 400, "INVALID_AUDIO", "下载"),
        (400, "Throttling.AllocationQuota", "您当前的配额为1000", 400, "VOICE_LIMIT_EXCEEDED", "1000"),
        (400, "Arrearage", "Access denied.", 502, "UPSTREAM_ERROR", "欠费"),
    )
    for status, code, message, ours, error, part in cases:
        with sandbox.faults(**fault("create_voice", status=status, code=code, message=message)):
            answer = await clone_file(account)
        assert refusal(answer) == (ours, error)
        assert part in answer.json()["message"]
        item = (await account.history())["items"][0]
        assert (item["status"], item["bill"], item["error_message"]) == ("failed", "0", answer.json()["message"])
        assert "voice_id" not in item
    assert len(asked(sandbox, account, "create_voice")) == len(cases)
    assert sandbox.voices(account.api_key) == []
    await no_more_than(backend, before)


async def test_an_upload_that_fails_makes_no_voice(account: Account, sandbox: Sandbox, backend: Server) -> None:
    before = samples_of(backend)
    with sandbox.faults(uploads={"how": "refused"}):
        answer = await clone_file(account)
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    assert asked(sandbox, account, "create_voice") == []
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")
    await no_more_than(backend, before)


async def test_with_a_bucket_the_sample_is_private_and_given_by_a_signed_url(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    # Everybody may read what is in this bucket, unless it is private by itself.
    settings = {**oss_settings(sandbox), **sandbox.settings, "LOG_LEVEL": "DEBUG"}
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        created = data_of(await clone_file(account))
        [request] = asked(sandbox, account, "create_voice")
        url = request["input"]["url"]
        bare = url.partition("?")[0]
        assert (request["audio_source"], request["audio_bytes"]) == ("url", len(sample()))
        assert re.search(r"/voices/audio/voice/20\d{6}/[0-9a-f-]{36}\.wav\?", url)
        assert httpx.get(url).content == sample()
        assert httpx.get(bare).status_code == 403
        other = await create_account(backend)
        for asking in (account, other):
            for address in (url, bare):
                for answer in (
                    await recognize(asking, audio_url=address),
                    await transcribe(asking, address),
                    await clone(asking, address),
                ):
                    assert refusal(answer) == (400, "INVALID_AUDIO")
        spoken = data_of(await account.synthesize(SENTENCE))["audio_url"]
        data_of(await clone(account, spoken))
        signed = await look(account, created["voice_id"], wait=20)
        data_of(await account.client.put(path_of(created["voice_id"]), files={"file": ("b.wav", sample(7))}))
        renewed = asked(sandbox, account, "update_voice")[0]["input"]["url"]
        async with asyncio.timeout(10), httpx.AsyncClient(trust_env=False) as reader:
            while (await reader.get(url)).status_code != 404:
                await asyncio.sleep(0.02)
            assert (await reader.get(renewed)).content == sample(7)
            assert (await account.client.delete(path_of(created["voice_id"]))).status_code == 200
            while (await reader.get(renewed)).status_code != 404:
                await asyncio.sleep(0.02)
        assert backend.stop() in ENDED_GRACEFULLY
        kept = [*written(backend).values(), backend.log.encode()]
        for secret in (account.api_key, signed["resource_link"], "Signature", "sandbox-secret", "Traceback"):
            assert not any(secret.encode() in each for each in kept), secret


async def test_a_sample_that_is_not_good_enough_ends_as_rejected_and_cannot_speak(
    account: Account, sandbox: Sandbox
) -> None:
    voice_id = await made(account, audio_url=REJECTED_SAMPLE)
    assert (await look(account, voice_id, wait=20))["status"] == "UNDEPLOYED"
    await item_with(account, "UNDEPLOYED")
    calls = len(sandbox.requests(account.api_key))
    answer = await account.synthesize("你好。", voice=voice_id)
    assert refusal(answer) == (400, "INVALID_VOICE")
    assert "UNDEPLOYED" in answer.json()["message"]
    assert sandbox.calls(account.api_key) == []
    assert len(sandbox.requests(account.api_key)) == calls
    data_of(await account.client.put(path_of(voice_id), json={"audio_url": PUBLIC_SAMPLE}))
    assert (await item_with(account, "OK"))["voice_id"] == voice_id
    data_of(await account.synthesize("你好。", voice=voice_id))
