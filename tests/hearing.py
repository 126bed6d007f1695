"""Speech to text as a client asks for it, and audio to send."""

import asyncio
import io
import math
import time
import uuid
import wave
from array import array
from typing import Any

import httpx

from tests.conftest import Account
from tests.databases import rows
from tests.servers import Server

FLASH = "qwen3-asr-flash"
AUDIO_ASR = "qwen-audio-asr"
FILETRANS = "qwen3-asr-flash-filetrans"
PARAFORMER = "paraformer-v2"

RECOGNITION = "/api/v1/services/aigc/multimodal-generation/generation"
TRANSCRIPTION = "/api/v1/services/audio/asr/transcription"

STRANGE_SPEECH = "欢迎使用语音识别服务。"
"""What the sandbox hears in audio that it did not speak."""

PUBLIC_URL = "https://media.example.com/meeting.mp3"
"""Four seconds of speech to the sandbox, which fetches nothing from elsewhere."""

PATIENCE_SECONDS = 20.0


def tone(seconds: float, *, channels: str = "t", rate: int = 8000) -> bytes:
    """A WAV with one letter per channel: `t` is a tone, `s` is silence."""
    second = array("h")
    for position in range(rate):
        sample = round(9000 * math.sin(2 * math.pi * 400 * position / rate))
        second.extend(sample if channel == "t" else 0 for channel in channels)
    frame_bytes = 2 * len(channels)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(len(channels))
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((second.tobytes() * math.ceil(seconds))[: round(seconds * rate) * frame_bytes])
    return file.getvalue()


async def speak(account: Account, text: str, **fields: Any) -> tuple[str, bytes]:
    """Have the sandbox speak a text, which it will know again: the URL and the audio."""
    answer = await account.synthesize(text, **fields)
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["data"]["audio_url"]
    return url, (await account.client.get(url)).content


def place(backend: Server, audio: bytes, suffix: str = "wav") -> str:
    """Put audio into the backend's own store; gives its URL."""
    name = f"{uuid.uuid4()}.{suffix}"
    folder = backend.folder / "data" / "media" / "audio" / "tts" / "20260101"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(audio)
    return f"{backend.url}/media/audio/tts/20260101/{name}"


async def recognize(account: Account, **body: Any) -> httpx.Response:
    """Ask for a recognition by JSON."""
    return await account.client.post("/api/audio/asr/recognize", json={"model": FLASH, **body})


async def recognize_file(account: Account, audio: bytes, name: str = "audio", **fields: str) -> httpx.Response:
    """Ask for a recognition by form."""
    form = {"model": FLASH, **fields}
    return await account.client.post("/api/audio/asr/recognize", data=form, files={"file": (name, audio)})


async def transcribe(account: Account, file_url: str = PUBLIC_URL, **body: Any) -> httpx.Response:
    """Ask for a transcription."""
    asked = {"model": FILETRANS, "file_url": file_url, **body}
    return await account.client.post("/api/audio/asr/transcribe", json=asked)


async def submit(account: Account, file_url: str = PUBLIC_URL, **body: Any) -> str:
    """Have a transcription begun; gives the task's id."""
    answer = await transcribe(account, file_url, **body)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["data"]["task_id"]
    return task_id


def data_of(answer: httpx.Response) -> dict[str, Any]:
    """What a successful answer holds."""
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and error name of an answer that must be a whole error envelope."""
    body = answer.json()
    assert body.keys() == {"code", "message", "data", "error"}
    assert (body["code"], body["data"]) == (answer.status_code, None)
    return answer.status_code, body["error"]


async def look(account: Account, task_id: str) -> dict[str, Any]:
    """What the task route tells."""
    return data_of(await account.client.get(f"/api/audio/asr/task/{task_id}"))


async def ended(account: Account, task_id: str, *, hurried: Server | None = None) -> dict[str, Any]:
    """What the task route tells once the task has its end; `hurried` is the server whose waits are left out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (state := await look(account, task_id))["task_status"] in {"PENDING", "RUNNING"}:
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.05 if hurried is None else 0.15)
        if hurried is not None:
            hurry(hurried, task_id)
    return state


async def settled(account: Account, record_id: int) -> dict[str, Any]:
    """A record from the history, which makes nobody ask the provider, once it has its end."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        [item] = [item for item in (await account.history())["items"] if item["id"] == record_id]
        if item.get("status") != "running":
            return dict(item)
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def hurry(server: Server, task_id: str) -> None:
    """Let the time pass that lies before the next look at a task."""
    rows(
        server,
        "UPDATE transcriptions SET checked_at = NULL, next_check_at = '2026-01-01 00:00:00'"
        " WHERE task_id = ? AND next_check_at IS NOT NULL",
        task_id,
    )
