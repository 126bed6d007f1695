"""A plain client of the sandbox's HTTP services, and audio to send to them."""

from __future__ import annotations

import io
import math
import ssl
import struct
import time
import uuid
import wave
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from .conftest import RunningSandbox
from .dialogue import dial

RECOGNITION = "/api/v1/services/aigc/multimodal-generation/generation"
TRANSCRIPTION = "/api/v1/services/audio/asr/transcription"
CUSTOMIZATION = "/api/v1/services/audio/tts/customization"
ENROLLMENT = "voice-enrollment"
FLASH = "qwen3-asr-flash"
FILETRANS = "qwen3-asr-flash-filetrans"
PARAFORMER = "paraformer-v2"
RESOLVE = {"X-DashScope-OssResourceResolve": "enable"}
STRANGE = "欢迎使用语音识别服务。"
PATIENCE = 8.0
_PERIOD = 20

_TLS = ssl.create_default_context()

ANYBODY = httpx.Client(timeout=PATIENCE, verify=_TLS)
"""A client without a key. Making a TLS context for every request would take most of the tests' time."""

Json = dict[str, Any]


def tone(seconds: float, *, channels: str = "t", rate: int = 8000) -> bytes:
    """A WAV with one character per channel: `t` is a tone, `s` is silence."""
    wave_form = [round(9000 * math.sin(2 * math.pi * position / _PERIOD)) for position in range(_PERIOD)]
    frames = b"".join(struct.pack("<h", sample * (channel == "t")) for sample in wave_form for channel in channels)
    size = round(seconds * rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(len(channels))
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((frames * (size // _PERIOD + 1))[: size * 2 * len(channels)])
    return file.getvalue()


def data_uri(audio: bytes, media_type: str = "audio/wav") -> str:
    return f"data:{media_type};base64,{b64encode(audio).decode()}"


def user(audio: str) -> Json:
    return {"role": "user", "content": [{"audio": audio}]}


def system(context: str) -> Json:
    return {"role": "system", "content": [{"text": context}]}


def error(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of a refusal, whose envelope must be whole."""
    body = response.json()
    assert body.keys() == {"code", "message", "request_id"}
    assert response.headers["x-request-id"] == body["request_id"]
    uuid.UUID(body["request_id"])
    return response.status_code, body["code"], body["message"]


def oss_error(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"].startswith("application/xml")
    return response.status_code, response.text.partition("<Code>")[2].partition("</Code>")[0]


def output(response: httpx.Response) -> Json:
    """The output of a customization, whose envelope must be whole."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert body.keys() == {"request_id", "output", "usage"}
    assert body["usage"] == {"count": 1}
    uuid.UUID(body["request_id"])
    return dict(body["output"])


def add_voices(server: RunningSandbox, api_key: str, **wanted: Any) -> list[str]:
    """Voices as if made elsewhere: their ids, the oldest first."""
    body = {"api_key": api_key, "target_model": "cosyvoice-v3-flash", "prefix": "mine", **wanted}
    response = ANYBODY.post(f"{server.http_url}/_sandbox/voices", json=body)
    assert response.status_code == 200, response.text
    return list(response.json()["voice_ids"])


class Services:
    """The services as one caller sees them; every caller has a key of its own."""

    def __init__(self, server: RunningSandbox, http: httpx.Client) -> None:
        self.server = server
        self.http = http
        self.key = http.headers["Authorization"].removeprefix("Bearer ")

    def recognise(self, audio: str, model: str = FLASH, context: str | None = None, **more: Any) -> httpx.Response:
        messages = [user(audio)] if context is None else [system(context), user(audio)]
        headers = more.pop("headers", {})
        body = {"model": model, "input": {"messages": messages}, **more}
        return self.http.post(RECOGNITION, json=body, headers=headers)

    def submit(self, model: str, *urls: str, headers: Json | None = None, **parameters: Any) -> httpx.Response:
        given = {"file_url": urls[0]} if model == FILETRANS else {"file_urls": list(urls)}
        body = {"model": model, "input": given, "parameters": parameters}
        return self.http.post(TRANSCRIPTION, json=body, headers={"X-DashScope-Async": "enable", **(headers or {})})

    def query(self, task_id: str) -> Json:
        response = self.http.get(f"/api/v1/tasks/{task_id}")
        assert response.status_code == 200
        return dict(response.json())

    def transcribe(self, model: str, *urls: str, **more: Any) -> Json:
        """Submit and wait for the last answer of the task API."""
        submitted = self.submit(model, *urls, **more)
        assert submitted.status_code == 200, submitted.text
        output = submitted.json()["output"]
        assert output["task_status"] == "PENDING"
        deadline = time.monotonic() + PATIENCE
        while (answer := self.query(output["task_id"]))["output"]["task_status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return answer

    def policy(self, model: str = FLASH) -> Json:
        response = self.http.get("/api/v1/uploads", params={"action": "getPolicy", "model": model})
        assert response.status_code == 200, response.text
        return dict(response.json()["data"])

    def upload(self, audio: bytes, model: str = FLASH, name: str = "a b.wav") -> str:
        """Upload a temporary file; its `oss://` URL."""
        policy = self.policy(model)
        response = post_form(policy, form(policy, name), audio)
        assert (response.status_code, response.content) == (200, b""), response.text
        return f"oss://{policy['upload_dir']}/{name}"

    def customize(self, action: str, headers: Json | None = None, **asked: Any) -> httpx.Response:
        body = {"model": ENROLLMENT, "input": {"action": action, **asked}}
        return self.http.post(CUSTOMIZATION, json=body, headers=headers)

    def enroll(self, url: str, target_model: str = "cosyvoice-v3-flash", prefix: str = "mine", **more: Any) -> str:
        """A new clone's id."""
        asked = {"target_model": target_model, "prefix": prefix, "url": url, **more}
        return str(output(self.customize("create_voice", RESOLVE, **asked))["voice_id"])

    def voice(self, voice_id: str) -> Json:
        return output(self.customize("query_voice", voice_id=voice_id))

    def voices(self, **asked: Any) -> list[Json]:
        return list(output(self.customize("list_voice", **asked))["voice_list"])

    def requests(self) -> list[Json]:
        """What the sandbox noted of this caller's requests."""
        return list(ANYBODY.get(f"{self.server.http_url}/_sandbox/requests", params={"api_key": self.key}).json())

    def ledger(self) -> list[Json]:
        """What the sandbox counts of this caller's work."""
        return list(ANYBODY.get(f"{self.server.http_url}/_sandbox/ledger", params={"api_key": self.key}).json())

    def switch_on(self, **faults: Any) -> None:
        ANYBODY.put(f"{self.server.http_url}/_sandbox/faults", json=faults).raise_for_status()


@contextmanager
def calling(server: RunningSandbox) -> Iterator[Services]:
    headers = {"Authorization": f"Bearer sk-test-{uuid.uuid4().hex}"}
    with httpx.Client(base_url=server.http_url, headers=headers, timeout=PATIENCE, verify=_TLS) as http:
        yield Services(server, http)


async def speak(server: RunningSandbox, *texts: str, key: str = "sk-test-1", **parameters: Any) -> bytes:
    """The audio of one CosyVoice task."""
    async with dial(server.ws_url, key) as dialogue:
        return (await dialogue.say(*texts, **parameters)).audio


def form(policy: Json, name: str) -> dict[str, str]:
    """The fields of a form upload (§6)."""
    return {
        "OSSAccessKeyId": policy["oss_access_key_id"],
        "Signature": policy["signature"],
        "policy": policy["policy"],
        "key": f"{policy['upload_dir']}/{name}",
        "x-oss-object-acl": policy["x_oss_object_acl"],
        "x-oss-forbid-overwrite": policy["x_oss_forbid_overwrite"],
        "success_action_status": "200",
    }


def post_form(policy: Json, fields: Json, audio: bytes, **more: Any) -> httpx.Response:
    return ANYBODY.post(policy["upload_host"], data=fields, files={"file": ("a.wav", audio)}, timeout=PATIENCE, **more)
