"""The same product on other parts: OSS instead of local files, PostgreSQL instead of SQLite, Redis for limits."""

import asyncio
from pathlib import Path

import httpx
import redis.asyncio

from tests.conftest import Account, CreateAccount
from tests.servers import Sandbox, Server, run_backend, run_sandbox
from tests.skipping import skip_without
from tests.sound import duration

REDIS_URL = "redis://127.0.0.1:6379/9"


def oss_settings(sandbox: Sandbox, **changes: str) -> dict[str, str]:
    """Settings for the sandbox as provider and as object store."""
    return {
        "DASHSCOPE_WS_URL": sandbox.ws_url,
        "OSS_ENDPOINT": sandbox.url,
        "OSS_REGION": "cn-hangzhou",
        "OSS_BUCKET": "voices",
        "OSS_ACCESS_KEY_ID": "sandbox-id",
        "OSS_ACCESS_KEY_SECRET": "sandbox-secret",
        **changes,
    }


async def test_audio_is_kept_in_a_public_bucket(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, oss_settings(sandbox)) as backend:
        account = await create_account(backend)
        data = (await account.synthesize("今天天气真好。", format="opus")).json()["data"]
        assert data["audio_url"].startswith(f"{sandbox.url}/voices/audio/tts/")
        audio = httpx.get(data["audio_url"])
        assert audio.headers["content-type"] == "audio/ogg"
        assert abs(duration(audio.content, "opus", 22050) - data["duration"]) <= 0.05
        assert (await account.client.get("/health/ready")).status_code == 200
        elsewhere = await account.client.get("/media/audio/tts/x.mp3")
        assert (elsewhere.status_code, elsewhere.headers["location"]) == (307, f"{sandbox.url}/voices/audio/tts/x.mp3")


async def test_a_private_bucket_is_played_through_signed_urls(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = oss_settings(sandbox, OSS_BUCKET="voices-private", OSS_URL_MODE="signed")
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        url = (await account.synthesize("今天天气真好。")).json()["data"]["audio_url"]
        assert httpx.get(url).status_code == 200
        assert httpx.get(url.partition("?")[0]).status_code == 403
        [item] = (await account.history())["items"]
        assert httpx.get(item["output_url"]).status_code == 200
        assert "sandbox-secret" not in backend.log
        assert "Signature" not in backend.log


async def test_a_store_that_stumbles_once_is_not_noticed(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, oss_settings(sandbox)) as backend:
        account = await create_account(backend)
        with sandbox.faults(oss_unavailable=1):
            assert (await account.synthesize("你好")).status_code == 200


async def test_a_store_that_is_gone_without_a_shelter_is_told_and_the_bill_stays_right(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, oss_settings(sandbox)) as backend:
        (tmp_path / "data" / "held").write_bytes(b"a file, where audio could be held")
        account = await create_account(backend)
        with sandbox.faults(oss_unavailable=-1):
            answer = await account.synthesize("你好，欢迎使用语音合成服务！")
            assert (answer.status_code, answer.json()["error"]) == (502, "UPSTREAM_ERROR")
            ready = await account.client.get("/health/ready")
            assert (ready.status_code, ready.json()["error"]) == (503, "NOT_READY")
            assert (await account.client.get("/health/live")).status_code == 200
        [item] = (await account.history())["items"]
        assert (item["status"], item["bill"]) == ("failed", "0.0004")
        (tmp_path / "data" / "held").unlink()
        async with asyncio.timeout(20):
            while (await account.client.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.1)


async def test_the_whole_path_on_postgresql_with_redis(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount, database_url: str
) -> None:
    client = redis.asyncio.Redis.from_url(REDIS_URL)
    try:
        await client.ping()
    except redis.exceptions.ConnectionError:
        skip_without(f"Redis at {REDIS_URL}")
    finally:
        await client.aclose()
    settings = {
        "DASHSCOPE_WS_URL": sandbox.ws_url,
        "DATABASE_URL": database_url,
        "REDIS_URL": REDIS_URL,
        "RATE_LIMIT": "6/minute",
    }
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        assert (await account.synthesize("你好")).status_code == 200
        streamed = await account.synthesize("你好", stream=True)
        assert streamed.status_code == 200
        history = await account.history()
        assert history["total"] == 2
        assert history["items"][0]["id"] == int(streamed.headers["x-record-id"])
        odd = await account.client.post("/api/auth/token", data={"username": "a\x00b", "password": "x"})
        assert odd.status_code == 400
        statuses = [(await account.client.get("/api/audio/tts/models")).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]


async def test_the_providers_own_rate_is_kept_by_queueing(tmp_path: Path, create_account: CreateAccount) -> None:
    with run_sandbox(tmp_path / "sandbox", "--rate-limit", "3") as strict:
        settings = {**strict.settings, "UPSTREAM_RATE": "3/second"}
        with run_backend(tmp_path / "backend", settings) as backend:
            account = await create_account(backend)
            answers = await asyncio.gather(*(account.synthesize(f"第{number}句") for number in range(7)))
            assert [answer.status_code for answer in answers] == [200] * 7
            outcomes = [call["outcome"] for call in strict.calls(account.api_key)]
            assert outcomes.count("finished") == 7
            assert len(outcomes) <= 8  # on a busy machine one submission may arrive a little early, and is repeated
            assert len({call["connection"] for call in strict.calls(account.api_key)}) < 7


async def test_a_provider_that_throttles_for_a_moment_is_asked_again(
    sandbox: Sandbox, backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(backend)
    with sandbox.faults(throttle_tasks=2):
        answer = await account.synthesize("你好")
    assert answer.status_code == 200
    assert answer.json()["data"]["characters"] == 4
    assert (await account.history())["total"] == 1


async def test_a_provider_that_throttles_for_ever_is_told_with_a_time_to_come_back(
    sandbox: Sandbox, account: Account
) -> None:
    with sandbox.faults(throttle_tasks=-1):
        answer = await account.synthesize("你好")
    assert (answer.status_code, answer.json()["error"]) == (429, "RATE_LIMITED")
    assert int(answer.headers["retry-after"]) >= 1
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")


async def test_a_silent_provider_times_out(tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount) -> None:
    with run_backend(tmp_path, {**sandbox.settings, "UPSTREAM_TIMEOUT": "0.5"}) as backend:
        account = await create_account(backend)
        with sandbox.faults(break_tasks=1, break_after_frames=1, break_how="silent"):
            answer = await account.synthesize("今天天气真好。" * 10, format="wav")
        assert (answer.status_code, answer.json()["error"]) == (504, "TIMEOUT")
        [item] = (await account.history())["items"]
        assert item["status"] == "failed"
        assert (await account.synthesize("你好")).status_code == 200
