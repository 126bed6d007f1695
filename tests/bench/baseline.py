"""The plain service that everybody writes first: the official SDK in a thread, one synthesizer for each request.

No login, no history, no bill, no shared connections. Served by `uvicorn tests.bench.baseline:app`.
"""

import os
import queue
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dashscope
from dashscope.audio.tts_v2 import AudioFormat, ResultCallback, SpeechSynthesizer
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

dashscope.api_key = "sk-test-baseline"
dashscope.base_websocket_api_url = os.environ["STAND_IN_URL"]
AUDIO = Path("audio")
AUDIO.mkdir(exist_ok=True)
FORMATS = {"mp3": AudioFormat.MP3_22050HZ_MONO_256KBPS, "pcm": AudioFormat.PCM_22050HZ_MONO_16BIT}
app = FastAPI()


class Order(BaseModel):
    """What is to be spoken."""

    model: str
    voice: str
    text: str
    format: str = "mp3"
    stream: bool = False


class Listener(ResultCallback):  # type: ignore[misc]  # the SDK has no types
    """Puts audio where the answer takes it from; None is its end."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[bytes | None] = queue.Queue()

    def on_data(self, data: bytes) -> None:
        """Some audio."""
        self.pieces.put(data)

    def on_complete(self) -> None:
        """The end."""
        self.pieces.put(None)

    def on_error(self, message: Any) -> None:
        """The end as well."""
        self.pieces.put(None)


@app.post("/api/audio/tts/synthesize", response_model=None)
def synthesize(order: Order) -> dict[str, Any] | StreamingResponse:
    """Speak a text."""
    if order.stream:
        return StreamingResponse(_stream(order))
    audio = SpeechSynthesizer(order.model, order.voice, FORMATS[order.format]).call(order.text)
    file = AUDIO / f"{uuid.uuid4().hex}.{order.format}"
    file.write_bytes(audio)
    return {"audio_url": str(file)}


def _stream(order: Order) -> Iterator[bytes]:
    listener = Listener()
    synthesizer = SpeechSynthesizer(order.model, order.voice, FORMATS[order.format], callback=listener)
    synthesizer.call(order.text)
    while (piece := listener.pieces.get()) is not None:
        yield piece
