"""A plain client of the CosyVoice socket, strict about what it hears."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import av
import websockets
from websockets.asyncio.client import ClientConnection

PATIENCE = 8.0
MODEL = "cosyvoice-v3-flash"
VOICE = "longanyang"

Event = dict[str, Any]


def kind(event: Event) -> str:
    """`task-started`, `sentence-begin`, ... : one word for an event."""
    if event["header"]["event"] == "result-generated":
        return str(event["payload"]["output"]["type"])
    return str(event["header"]["event"])


@dataclass
class Answer:
    """What came back for a task, up to and including its last event."""

    events: list[Event] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)

    @property
    def audio(self) -> bytes:
        return b"".join(self.frames)

    @property
    def kinds(self) -> list[str]:
        return [kind(event) for event in self.events]

    @property
    def characters(self) -> int:
        return int(self.events[-1]["payload"]["usage"]["characters"])

    @property
    def error(self) -> tuple[str, str]:
        header = self.events[-1]["header"]
        return header["error_code"], header["error_message"]

    def of(self, wanted: str) -> list[Event]:
        return [event for event in self.events if kind(event) == wanted]

    @property
    def sentences(self) -> list[str]:
        return [event["payload"]["output"]["original_text"] for event in self.of("sentence-begin")]


class Dialogue:
    """One socket. Methods are named for what they send."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.task_id = ""

    async def send(self, action: str, payload: Event, *, task_id: str | None = None) -> None:
        header = {"action": action, "task_id": task_id or self.task_id, "streaming": "duplex"}
        await self.connection.send(json.dumps({"header": header, "payload": payload}))

    async def run(self, model: str = MODEL, *, task_id: str | None = None, **parameters: Any) -> None:
        self.task_id = task_id or uuid.uuid4().hex
        await self.send("run-task", run_payload(model, **parameters))

    async def start(self, model: str = MODEL, **parameters: Any) -> None:
        await self.run(model, **parameters)
        assert kind(await self.event()) == "task-started"

    async def text(self, text: str) -> None:
        await self.send("continue-task", {"input": {"text": text}})

    async def flush(self) -> None:
        await self.send("continue-task", {"input": {"flush": True}})

    async def finish(self) -> None:
        await self.send("finish-task", {"input": {}})

    async def cancel(self) -> None:
        await self.send("finish-task", {"input": {"directive": "cancel"}})

    async def frame(self) -> str | bytes:
        return await asyncio.wait_for(self.connection.recv(), PATIENCE)

    async def event(self) -> Event:
        frame = await self.frame()
        assert isinstance(frame, str)
        event: Event = json.loads(frame)
        assert event["header"]["task_id"] == self.task_id
        return event

    async def listen(self, until: str = "task-finished") -> Answer:
        """Everything up to an event of the kind `until`; sentence-synthesis and audio must come in pairs."""
        answer = Answer()
        while True:
            event = await self.event()
            answer.events.append(event)
            if kind(event) == "sentence-synthesis":
                audio = await self.frame()
                assert isinstance(audio, bytes)
                assert audio
                answer.frames.append(audio)
            if kind(event) == until:
                return answer
            assert kind(event) not in ("task-failed", "task-finished"), event

    async def failure(self) -> tuple[str, str]:
        """The code and message of the coming task-failed, after which the server must close."""
        error = (await self.listen("task-failed")).error
        await self.closed()
        return error

    async def closed(self) -> int | None:
        await asyncio.wait_for(self.connection.wait_closed(), PATIENCE)
        return self.connection.close_code

    async def say(self, *texts: str, model: str = MODEL, **parameters: Any) -> Answer:
        """A whole task."""
        await self.start(model, **parameters)
        for text in texts:
            await self.text(text)
        await self.finish()
        return await self.listen()


def run_payload(model: str = MODEL, **parameters: Any) -> Event:
    defaults = {"text_type": "PlainText", "voice": VOICE, "format": "pcm", "sample_rate": 22050}
    return {
        "task_group": "audio",
        "task": "tts",
        "function": "SpeechSynthesizer",
        "model": model,
        "parameters": defaults | parameters,
        "input": {},
    }


@asynccontextmanager
async def dial(url: str, key: str = "sk-test-1") -> AsyncIterator[Dialogue]:
    headers = {"Authorization": f"Bearer {key}"}
    async with websockets.connect(
        url, additional_headers=headers, compression=None, proxy=None, max_size=None, open_timeout=PATIENCE
    ) as connection:
        yield Dialogue(connection)


def decode(audio: bytes, audio_format: str, sample_rate: int) -> tuple[list[int], float]:
    """16-bit samples at 8 kHz and the duration in seconds by decoded samples."""
    options = {"sample_rate": str(sample_rate), "ch_layout": "mono"} if audio_format == "pcm" else {}
    container_format = {"pcm": "s16le", "opus": "ogg"}.get(audio_format, audio_format)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=8000)
    samples: list[int] = []
    decoded = 0
    with av.open(io.BytesIO(audio), "r", format=container_format, options=options) as container:
        rate = container.streams.audio[0].rate
        for frame in container.decode(audio=0):
            decoded += frame.samples
            for piece in resampler.resample(frame):
                samples += memoryview(bytes(piece.planes[0])[: piece.samples * 2]).cast("h").tolist()
    return samples, decoded / rate


def loudness(samples: list[int], width: int = 320) -> list[float]:
    """The energy of the samples in steps of 40 ms at 8 kHz: the shape by which speech is recognised again."""
    return [
        (sum(sample * sample for sample in samples[start : start + width]) / width) ** 0.5
        for start in range(0, len(samples) - width, width)
    ]


def likeness(one: list[int], other: list[int]) -> float:
    """How alike two recordings are, 1.0 for the same; a codec may have delayed the second by up to 150 ms."""
    shape = loudness(one)
    return max(_correlation(shape, loudness(other[delay:])) for delay in range(0, 1200, 80))


def _correlation(one: list[float], other: list[float]) -> float:
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    mean_one, mean_other = sum(one) / length, sum(other) / length
    product = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    spread = sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other)
    return float(product / spread**0.5)


def height(samples: list[int], sample_rate: int = 8000) -> float:
    """The median fundamental frequency in Hz of the loud parts, by autocorrelation."""
    width = sample_rate // 25
    found = []
    for start in range(0, len(samples) - 2 * width, width):
        part = samples[start : start + 2 * width]
        energy = sum(sample * sample for sample in part[:width])
        if energy / width < 1_000_000:
            continue
        lags = range(sample_rate // 450, sample_rate // 60)
        alike = {lag: sum(part[n] * part[n + lag] for n in range(0, width, 2)) for lag in lags}
        enough = 0.9 * max(alike.values())
        period = next(lag for lag in lags if alike[lag] >= enough and alike[lag] >= alike.get(lag + 1, 0))
        found.append(sample_rate / period)
    return sorted(found)[len(found) // 2]
