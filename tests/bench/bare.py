"""The call without anything between: a warm WebSocket connection to the provider (PROTOCOL §1.2, §1.7)."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.bench.heard import Heard

MODEL, VOICE = "cosyvoice-v3-flash", "longanyang"


@asynccontextmanager
async def open_line(ws_url: str, api_key: str = "sk-test-bare") -> AsyncIterator[ClientConnection]:
    """A connection that has carried no task yet."""
    async with connect(
        ws_url,
        additional_headers={"Authorization": f"Bearer {api_key}"},
        compression=None,
        proxy=None,
        ping_interval=None,
        open_timeout=30,
    ) as line:
        yield line


async def speak(line: ClientConnection, text: str, audio_format: str = "mp3", *, keeps: bool = False) -> Heard:
    """One task from the wish for it to `task-finished`."""
    heard = Heard(pieces=[] if keeps else None)
    header = {"task_id": uuid.uuid4().hex, "streaming": "duplex"}
    parameters = {"text_type": "PlainText", "voice": VOICE, "format": audio_format, "sample_rate": 22_050}
    function = {"task_group": "audio", "task": "tts", "function": "SpeechSynthesizer", "model": MODEL}
    await line.send(_message(header, "run-task", {**function, "parameters": parameters, "input": {}}))
    await line.recv()  # task-started
    await line.send(_message(header, "continue-task", {"input": {"text": text}}))
    await line.send(_message(header, "finish-task", {"input": {}}))
    while True:
        message = await line.recv()
        if isinstance(message, bytes):
            heard.hear(message)
        elif '"task-finished"' in message:
            heard.end(is_whole=True)
            return heard


def _message(header: dict[str, str], action: str, payload: dict[str, Any]) -> str:
    return json.dumps({"header": {**header, "action": action}, "payload": payload})
