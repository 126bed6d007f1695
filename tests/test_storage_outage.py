"""OSS is away after DashScope was paid: the audio is there all the same, and in OSS as soon as that is back."""

import asyncio
import io
from pathlib import Path

import httpx

from app.storage.held import HeldFolder
from tests.conftest import Account, CreateAccount
from tests.hearing import TRANSCRIPTION, settled, transcribe
from tests.narrating import ask, audio_of, narrate, padded, record_of
from tests.servers import Sandbox, run_backend
from tests.test_deployments import oss_settings

UPLOAD_SECONDS = 30.0


def settings_of(sandbox: Sandbox, **changes: str) -> dict[str, str]:
    return {**oss_settings(sandbox, **changes), **sandbox.settings}


def held_in(folder: Path) -> int:
    return len(list((folder / "data" / "held").glob("*.json")))


async def output_urls(account: Account) -> list[str]:
    return [item["output_url"] for item in (await account.history(type="tts"))["items"]]


async def uploaded(folder: Path) -> None:
    async with asyncio.timeout(UPLOAD_SECONDS):
        while held_in(folder):
            await asyncio.sleep(0.05)


async def gauge(account: Account, name: str) -> float:
    lines = (await account.client.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def test_paid_audio_outlives_an_outage_and_a_crash(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with sandbox.faults(oss_unavailable=-1):
        with run_backend(tmp_path, settings_of(sandbox)) as backend:
            account = await create_account(backend)
            answer = await account.synthesize("今天天气真好。")
            assert answer.status_code == 200, answer.text
            url = answer.json()["data"]["audio_url"]
            assert url.startswith(f"{backend.url}/media/audio/tts/")
            content = await audio_of(account, url)
            part = await account.client.get(url, headers={"Range": "bytes=10-19"})
            assert (part.status_code, part.content) == (206, content[10:20])
            streamed = await account.synthesize("你好", stream=True, format="wav")
            urls = await output_urls(account)
            assert urls[1] == url
            assert len(await audio_of(account, urls[0])) == len(streamed.content)
            heard = await account.client.post(
                "/api/audio/asr/recognize", json={"model": "qwen3-asr-flash", "audio_url": url}
            )
            assert heard.status_code == 200, heard.text
            friend = await create_account(backend)
            heard = await friend.client.post(
                "/api/audio/asr/recognize", json={"model": "qwen3-asr-flash", "audio_url": url}
            )
            assert heard.status_code == 200, heard.text
            assert (await account.client.get("/health/ready")).status_code == 200
            assert await gauge(account, "held_audio_files") == 2
            assert await gauge(account, "held_audio_bytes") == len(content) + len(streamed.content)
            assert await gauge(account, "held_audio_uploads_put_off_total") == 2
            backend.kill()
            assert backend.log.count('"event": "store_away"') == 1
        with run_backend(tmp_path, settings_of(sandbox)) as backend:
            account.client.base_url = httpx.URL(backend.url)
            path = httpx.URL(url).path
            assert await audio_of(account, path) == content
            assert await gauge(account, "held_audio_files") == 2
            backend.kill()
    with run_backend(tmp_path, settings_of(sandbox)) as backend:
        account.client.base_url = httpx.URL(backend.url)
        await uploaded(tmp_path)
        stored = await output_urls(account)
        assert stored[1] == f"{sandbox.url}/voices/{path.removeprefix('/media/')}"
        assert await audio_of(account, stored[1]) == content
        played = await account.client.get(path, follow_redirects=True)
        assert (played.content, played.headers["content-type"]) == (content, "audio/mpeg")
        assert await gauge(account, "held_audio_files") == 0
        assert '"event": "store_back"' in backend.log


async def test_a_long_text_is_finished_while_there_is_no_store(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = settings_of(sandbox, OSS_BUCKET="voices-private", OSS_URL_MODE="signed")
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        with sandbox.faults(oss_unavailable=-1):
            told = await narrate(account, padded(3), subtitle="srt")
            content = await audio_of(account, told["audio_url"])
            assert (await account.client.get(told["audio_url"].partition("?")[0])).status_code == 404
            assert len(await audio_of(account, told["subtitle_url"])) > 100
            async with asyncio.timeout(UPLOAD_SECONDS):
                while held_in(tmp_path) > 2:  # the work is removed, wherever it was
                    await asyncio.sleep(0.05)
        await uploaded(tmp_path)
        record = await record_of(account, told["record_id"])
        assert record["output_url"].startswith(sandbox.url)
        assert httpx.get(record["output_url"]).content == content
        played = await account.client.get(told["audio_url"], follow_redirects=True, headers={"Authorization": ""})
        assert played.content == content
        assert "signature=" not in backend.log


async def test_what_could_be_kept_nowhere_is_not_bought(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, settings_of(sandbox, HELD_AUDIO_MAX_MB="1")) as backend:
        account = await create_account(backend)
        with sandbox.faults(oss_unavailable=-1):
            filler = io.BytesIO(bytes(15 * 2**16 - 10_000))
            HeldFolder(tmp_path / "data" / "held", 2**20).write("audio/tts/filler.mp3", filler, "audio/mpeg")
            assert (await account.synthesize("你好", format="wav")).status_code == 200
            # The filler came from another process: it is counted whenever somebody lists the folder.
            assert "held_audio_files 2" in (await account.client.get("/metrics")).text
            bought = len(sandbox.calls(account.api_key))
            assert bought == 1
            for refused in (
                await account.synthesize("你好"),
                await account.synthesize("你好", stream=True),
                await ask(account, "你好"),
                await account.client.get("/health/ready"),
            ):
                assert (refused.status_code, refused.json()["error"]) == (503, "NOT_READY")
            assert int((await account.synthesize("你好")).headers["retry-after"]) >= 1
            assert len(sandbox.calls(account.api_key)) == bought
        await uploaded(tmp_path)
        assert (await account.synthesize("你好")).status_code == 200
        assert (await account.client.get("/health/ready")).status_code == 200


async def test_audio_that_still_waits_for_the_store_can_be_transcribed(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, settings_of(sandbox)) as backend:
        account = await create_account(backend)
        with sandbox.faults(oss_unavailable=-1):
            url = (await account.synthesize("今天天气真好。")).json()["data"]["audio_url"]
        others_turn = HeldFolder(tmp_path / "data" / "held", 2**20).take_turn()
        assert others_turn is not None
        with others_turn:  # so that it stays here although the store is back
            submitted = await transcribe(account, url)
            assert submitted.status_code == 200, submitted.text
            record = await settled(account, submitted.json()["data"]["record_id"])
            assert held_in(tmp_path) == 1
        [submission] = [each for each in sandbox.requests(account.api_key) if each["path"] == TRANSCRIPTION]
        fetched = await account.client.get(submission["input"]["file_url"], headers={"Authorization": ""})
        assert fetched.status_code == 200, "the provider may fetch it long after it took the task on"
    assert "status" not in record, record
    assert "今天天气真好" in record["output_text"]
