"""Long audio to text, as the client sees it: spec 2.2 and 2.3."""

import asyncio
import json
import re
import uuid
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import (
    AUDIO_ASR,
    FILETRANS,
    FLASH,
    PARAFORMER,
    PUBLIC_URL,
    STRANGE_SPEECH,
    TRANSCRIPTION,
    data_of,
    ended,
    look,
    place,
    refusal,
    speak,
    submit,
    tone,
    transcribe,
)
from tests.servers import Sandbox, Server

MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
TEXT = "今天天气真好。我们一起去公园散步吧。"


def is_recent(moment: str) -> bool:
    """Whether this is about now, on the clock that clients are shown."""
    zone = ZoneInfo("Asia/Shanghai")
    age = datetime.now(zone) - datetime.fromisoformat(moment).replace(tzinfo=zone)
    return MOMENT.fullmatch(moment) is not None and -2 < age.total_seconds() < 60


async def test_the_answers_are_what_the_spec_says(account: Account, backend: Server, sandbox: Sandbox) -> None:
    url, _ = await speak(account, TEXT)
    submitted = data_of(await transcribe(account, url))
    assert submitted.keys() == {"task_id", "task_status", "record_id"}
    assert (submitted["task_status"], type(submitted["record_id"])) == ("PENDING", int)
    task_id = submitted["task_id"]
    first = await look(account, task_id)
    assert first.keys() == {"task_id", "task_status", "submit_time"}
    [item] = (await account.history(type="asr"))["items"]
    assert (item["id"], item["status"], item["bill"]) == (submitted["record_id"], "running", "0")
    times = {"submit_time": "2026-11-01 10:00:00.123", "scheduled_time": "2026-11-01 10:00:01.999"}
    output = {"task_id": task_id, "task_status": "RUNNING", **times, "task_metrics": {"TOTAL": 1}}
    running = {"path": f"/api/v1/tasks/{task_id}", "status": 200, "body": json.dumps({"output": output})}
    with sandbox.faults(requests=[running]):
        while "scheduled_time" not in (state := await look(account, task_id)):
            await asyncio.sleep(0.05)
    assert state == {
        "task_id": task_id,
        "task_status": "RUNNING",
        "submit_time": "2026-11-01 10:00:00",
        "scheduled_time": "2026-11-01 10:00:01",
    }
    done = await ended(account, task_id, hurried=backend)
    assert done.keys() == {
        *("task_id", "task_status", "submit_time", "scheduled_time", "end_time"),
        *("result", "usage", "bill"),
    }
    assert (done["task_id"], done["task_status"]) == (task_id, "SUCCEEDED")
    assert all(is_recent(done[name]) for name in ("submit_time", "scheduled_time", "end_time"))
    assert done["submit_time"] <= done["scheduled_time"] <= done["end_time"]
    assert done["result"].keys() == {"transcription_url", "transcripts"}
    assert done["result"]["transcription_url"].startswith(f"{sandbox.url}/")
    [transcript] = done["result"]["transcripts"]
    assert transcript.keys() == {"channel_id", "text", "sentences"}
    assert (transcript["channel_id"], transcript["text"]) == (0, TEXT)
    assert [sentence["text"] for sentence in transcript["sentences"]] == ["今天天气真好。", "我们一起去公园散步吧。"]
    for number, sentence in enumerate(transcript["sentences"]):
        assert sentence.keys() == {"begin_time", "end_time", "text", "sentence_id", "language", "emotion"}
        assert (sentence["sentence_id"], sentence["language"], sentence["emotion"]) == (number, "zh", "neutral")
        assert 0 <= sentence["begin_time"] < sentence["end_time"]
    seconds = done["usage"]["seconds"]
    assert done["usage"] == {"seconds": seconds}
    assert done["bill"] == f"{0.0004 * seconds:.4f}"
    item = (await account.history(type="asr"))["items"][0]
    assert item.keys() == {"id", "type", "model_name", "input_data", "output_text", "duration", "bill", "created_at"}
    assert (item["output_text"], item["duration"], item["bill"]) == (TEXT, seconds, done["bill"])
    assert json.loads(item["input_data"])["file_url"] == url


async def test_paraformer_hears_the_same_and_bills_speech_only(account: Account, backend: Server) -> None:
    task_id = await submit(account, place(backend, tone(2.2)), model=PARAFORMER, language="zh")
    done = await ended(account, task_id, hurried=backend)
    assert done.keys() == {
        *("task_id", "task_status", "submit_time", "scheduled_time", "end_time"),
        *("result", "usage", "bill"),
    }
    [transcript] = done["result"]["transcripts"]
    assert transcript.keys() == {"channel_id", "text", "sentences"}
    assert transcript["text"] == STRANGE_SPEECH
    for sentence in transcript["sentences"]:
        assert sentence.keys() == {"begin_time", "end_time", "text", "sentence_id"}
    assert (done["usage"], done["bill"]) == ({"seconds": 3}, "0.0012")


async def test_our_own_audio_is_uploaded_for_the_provider(account: Account, sandbox: Sandbox, backend: Server) -> None:
    url, audio = await speak(account, TEXT, format="wav")
    tasks = {model: await submit(account, url, model=model) for model in (FILETRANS, PARAFORMER)}
    requests = sandbox.requests(account.api_key)
    assert [request["path"] for request in requests[:4]] == ["/api/v1/uploads", TRANSCRIPTION] * 2
    for number, (model, task_id) in enumerate(tasks.items()):
        assert (await ended(account, task_id, hurried=backend))["result"]["transcripts"][0]["text"] == TEXT
        policy, submission = sandbox.requests(account.api_key)[2 * number : 2 * number + 2]
        assert policy["model"] == submission["model"] == model
        assert submission["headers"] == {"x-dashscope-async": "enable", "x-dashscope-ossresourceresolve": "enable"}
        assert (submission["audio_source"], submission["audio_bytes"]) == ("oss", len(audio))


async def test_a_public_url_and_every_field_reach_the_provider(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    url = "https://b.oss-cn-beijing.aliyuncs.com/long%20audio+1.mp3?Expires=1&Signature=a%2Bb%3D"
    tasks = [
        await submit(
            account, url, language="ja", enable_itn=True, context="百炼", channel_id=[0, 3], enable_words=True
        ),
        await submit(account, url),
        await submit(account, url, model=PARAFORMER, language="ja", enable_itn=True, channel_id=[1, 0]),
        await submit(account, url, model=PARAFORMER),
    ]
    full, plain, paraformer, paraformer_plain = (
        request for request in sandbox.requests(account.api_key) if request["path"] == TRANSCRIPTION
    )
    assert full["input"] == plain["input"] == {"file_url": url}
    assert full["parameters"] == {
        "channel_id": [0, 3],
        "enable_itn": True,
        "enable_words": True,
        "language": "ja",
        "corpus": {"text": "百炼"},
    }
    assert plain["parameters"] == {"channel_id": [0], "enable_itn": False, "enable_words": False}
    assert paraformer["input"] == paraformer_plain["input"] == {"file_urls": [url]}
    hinted = {"channel_id": [1, 0], "timestamp_alignment_enabled": True, "language_hints": ["ja"]}
    assert paraformer["parameters"] == hinted
    assert paraformer_plain["parameters"] == {"channel_id": [0], "timestamp_alignment_enabled": True}
    assert full["headers"] == {"x-dashscope-async": "enable"}
    await asyncio.gather(*(ended(account, task_id, hurried=backend) for task_id in tasks))
    assert "Signature" not in backend.log
    assert account.api_key not in backend.log


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"model": "whisper-1"}, "INVALID_MODEL", "whisper-1"),
        ({"model": FLASH}, "INVALID_MODEL", "recognize"),
        ({"model": AUDIO_ASR}, "INVALID_MODEL", "recognize"),
        ({"model": PARAFORMER, "context": "百炼"}, "INVALID_REQUEST", "context"),
        ({"model": PARAFORMER, "language": "it"}, "INVALID_REQUEST", "language"),
        ({"language": "klingon"}, "INVALID_REQUEST", "language"),
        ({"channel_id": []}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": [0, 1, 0]}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": [-1]}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": [True]}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": ["0"]}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": 0}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": None}, "INVALID_REQUEST", "channel_id"),
        ({"channel_id": list(range(100))}, "INVALID_REQUEST", "channel_id"),
        ({"context": "词" * 30_000}, "INVALID_REQUEST", "10000"),
        ({"enable_itn": "yes"}, "INVALID_REQUEST", "enable_itn"),
        ({"file_url": None}, "INVALID_REQUEST", "file_url"),
        ({"file_url": ""}, "INVALID_REQUEST", "file_url"),
    ],
)
async def test_what_is_wrong_is_refused_before_the_provider_is_asked(
    account: Account, sandbox: Sandbox, fields: dict[str, Any], error: str, part: str
) -> None:
    answer = await transcribe(account, **{"file_url": PUBLIC_URL, **fields})
    assert refusal(answer) == (400, error)
    assert part in answer.json()["message"]
    assert sandbox.requests(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_without_a_key_nothing_is_submitted(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend, api_key=None)
    assert refusal(await transcribe(account)) == (403, "NO_API_KEY")
    assert (await account.history())["total"] == 0


@pytest.mark.parametrize(
    ("struck", "status", "error"),
    [
        ({"status": 500}, 502, "UPSTREAM_ERROR"),
        ({"status": 401, "code": "InvalidApiKey", "message": "Invalid API-key provided."}, 401, "UNAUTHORIZED"),
        ({"status": 404, "code": "ModelNotFound", "message": "Model not found."}, 400, "INVALID_MODEL"),
    ],
)
async def test_a_submission_that_fails_is_told_and_not_repeated(
    account: Account, sandbox: Sandbox, struck: dict[str, Any], status: int, error: str
) -> None:
    with sandbox.faults(requests=[{"path": TRANSCRIPTION, **struck}]):
        answer = await transcribe(account)
    assert refusal(answer) == (status, error)
    assert len(sandbox.requests(account.api_key)) == 1
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")
    assert item["error_message"] == answer.json()["message"]


async def test_a_throttled_submission_is_made_again(account: Account, backend: Server, sandbox: Sandbox) -> None:
    throttled = {"path": TRANSCRIPTION, "status": 429, "code": "Throttling.RateQuota", "message": "", "count": 1}
    with sandbox.faults(requests=[throttled]):
        task_id = await submit(account)
    assert (await ended(account, task_id, hurried=backend))["bill"] == "0.0016"
    assert (await account.history())["total"] == 1


async def test_each_channel_is_transcribed_and_billed(account: Account, backend: Server) -> None:
    stereo = place(backend, tone(2.5, channels="tt"))
    both, second, silent_too, speech_only = await asyncio.gather(
        *(
            submit(account, stereo, channel_id=[0, 1]),
            submit(account, stereo, channel_id=[1]),
            submit(account, place(backend, tone(2.5, channels="ts")), channel_id=[0, 1]),
            submit(account, place(backend, tone(2.5, channels="ts")), channel_id=[0, 1], model=PARAFORMER),
        )
    )
    done = await ended(account, both, hurried=backend)
    assert [transcript["channel_id"] for transcript in done["result"]["transcripts"]] == [0, 1]
    assert (done["usage"], done["bill"]) == ({"seconds": 6}, "0.0024")
    done = await ended(account, second, hurried=backend)
    assert [transcript["channel_id"] for transcript in done["result"]["transcripts"]] == [1]
    assert (done["usage"], done["bill"]) == ({"seconds": 3}, "0.0012")
    done = await ended(account, silent_too, hurried=backend)
    assert [transcript["text"] for transcript in done["result"]["transcripts"]] == [STRANGE_SPEECH, ""]
    assert done["bill"] == "0.0024"
    done = await ended(account, speech_only, hurried=backend)
    assert done["result"]["transcripts"][0]["text"] == STRANGE_SPEECH
    assert done["bill"] == "0.0012"


async def test_a_task_that_fails_gives_the_reason_in_words(account: Account, backend: Server) -> None:
    reasons = {
        "missing": ("FILE_404_NOT_FOUND", "不存在"),
        "forbidden": ("FILE_403_FORBIDDEN", "权限"),
        "unreachable": ("FILE_DOWNLOAD_FAILED", "下载"),
        "broken": ("DECODE_ERROR", "解码"),
    }
    tasks = {
        (name, model): await submit(account, f"https://media.example.com/{name}.mp3", model=model)
        for name in reasons
        for model in (FILETRANS, PARAFORMER)
    }
    for (name, _), task_id in tasks.items():
        code, words = reasons[name]
        state = await ended(account, task_id, hurried=backend)
        assert state.keys() == {
            *("task_id", "task_status", "submit_time", "scheduled_time", "end_time"),
            *("error_message", "bill"),
        }
        assert (state["task_status"], state["bill"]) == ("FAILED", "0")
        assert words in state["error_message"]
        assert code in state["error_message"]
    for item in (await account.history())["items"]:
        assert (item["status"], item["bill"]) == ("failed", "0")
        assert item["error_message"]
        assert "output_text" not in item


async def test_thirteen_hours_are_too_long(account: Account, backend: Server) -> None:
    state = await ended(account, await submit(account, "https://media.example.com/long.mp3"), hurried=backend)
    assert (state["task_status"], state["bill"]) == ("FAILED", "0")
    assert "时长" in state["error_message"]
    assert "AUDIO_DURATION_TOO_LONG" in state["error_message"]


async def test_silence_is_a_success_without_words(account: Account, backend: Server) -> None:
    silent = "https://media.example.com/silent.mp3"
    tasks = {model: await submit(account, silent, model=model) for model in (FILETRANS, PARAFORMER)}
    for model, bill, seconds in ((FILETRANS, "0.0016", 4), (PARAFORMER, "0", 0)):
        state = await ended(account, tasks[model], hurried=backend)
        assert (state["task_status"], state["bill"], state["usage"]) == ("SUCCEEDED", bill, {"seconds": seconds})
        assert state["result"]["transcripts"] == [{"channel_id": 0, "text": "", "sentences": []}]
        answer = await account.client.get(f"/api/audio/asr/task/{tasks[model]}/subtitle", params={"format": "srt"})
        assert (answer.status_code, answer.text.strip()) == (200, "")
    for item in (await account.history())["items"]:
        assert item["output_text"] == ""
        assert "status" not in item


async def test_nobody_sees_the_task_of_another(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    owner = await create_account(backend)
    colleague = await create_account(backend, api_key=owner.api_key)
    task_id = await submit(owner)
    asked_before = len(sandbox.requests(owner.api_key))
    for wrong in (task_id, str(uuid.uuid4()), "x", "%2e%2e", "任务", f"{task_id}%00", f"{task_id}/"):
        for path in (f"/api/audio/asr/task/{wrong}", f"/api/audio/asr/task/{wrong}/subtitle"):
            answer = await colleague.client.get(path)
            assert answer.status_code == 404, wrong
            if not wrong.endswith("/"):
                assert refusal(answer) == (404, "TASK_NOT_FOUND")
    assert len(sandbox.requests(owner.api_key)) == asked_before
    assert (await ended(owner, task_id, hurried=backend))["task_status"] == "SUCCEEDED"
    assert refusal(await colleague.client.get(f"/api/audio/asr/task/{task_id}")) == (404, "TASK_NOT_FOUND")
    del colleague.client.headers["Authorization"]
    assert refusal(await colleague.client.get(f"/api/audio/asr/task/{task_id}")) == (401, "UNAUTHORIZED")


async def test_polls_are_answered_from_what_is_known(account: Account, sandbox: Sandbox, backend: Server) -> None:
    task_id = await submit(account)
    for _ in range(5):
        await look(account, task_id)
    assert [request["method"] for request in sandbox.requests(account.api_key)] == ["POST"]
    done = await ended(account, task_id, hurried=backend)
    asked = len(sandbox.requests(account.api_key))
    with sandbox.faults(requests=[{"path": f"/api/v1/tasks/{task_id}", "status": 500}], results={"status": 404}):
        assert [await look(account, task_id) for _ in range(10)] == [done] * 10
    assert len(sandbox.requests(account.api_key)) == asked
    assert rows(
        backend, "SELECT count(*) FROM bills JOIN transcriptions USING (record_id) WHERE task_id = ?", task_id
    ) == [(1,)]
