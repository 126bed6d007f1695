from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

import app.sandbox
from app.__main__ import main
from app.sandbox import SandboxOptions

from .conftest import RunningSandbox
from .dialogue import dial

pytestmark = pytest.mark.anyio

Start = Callable[[SandboxOptions], RunningSandbox]


async def test_audio_comes_as_many_times_as_fast_as_told(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(speed=4.0))
    async with dial(server.ws_url) as dialogue:
        started = time.monotonic()
        answer = await dialogue.say("床前明月光，疑是地上霜。")
        elapsed = time.monotonic() - started
    seconds = len(answer.audio) / 44100
    assert seconds > 2
    assert elapsed == pytest.approx(seconds / 4, abs=0.25)


async def test_the_first_audio_of_a_task_takes_its_time(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(first_audio_seconds=0.4))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await asyncio.sleep(0.3)
        texted = time.monotonic()
        await dialogue.text("第一句。")
        await dialogue.listen("sentence-synthesis")
        assert 0.35 < time.monotonic() - texted < 0.65
        texted = time.monotonic()
        await dialogue.text("第二句。")
        await dialogue.finish()
        await dialogue.listen()
        assert time.monotonic() - texted < 0.3


async def test_a_sentence_completed_later_does_not_wait_again(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(first_audio_seconds=0.3))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("没")
        await asyncio.sleep(0.4)
        texted = time.monotonic()
        await dialogue.text("完。")
        await dialogue.listen("sentence-synthesis")
        assert time.monotonic() - texted < 0.2


async def test_a_cancel_does_not_wait_for_the_first_audio(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(first_audio_seconds=5.0))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("第一句。")
        await dialogue.listen("sentence-begin")
        before = time.monotonic()
        await dialogue.cancel()
        answer = await dialogue.listen()
        assert time.monotonic() - before < 1.0
    assert (answer.frames, answer.characters) == ([], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"speed": 0.0},
        {"speed": -1.0},
        {"speed": float("nan")},
        {"first_audio_seconds": -0.1},
        {"words_in": "task-started"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SandboxOptions(**options)


@pytest.mark.parametrize(
    ("switches", "options"),
    [
        ([], SandboxOptions()),
        (["--realtime"], SandboxOptions(speed=1.0)),
        (["--speed", "2.5"], SandboxOptions(speed=2.5)),
        (["--first-audio-seconds", "0.3"], SandboxOptions(first_audio_seconds=0.3)),
    ],
)
def test_the_command_line_sets_the_pace(
    monkeypatch: pytest.MonkeyPatch, switches: list[str], options: SandboxOptions
) -> None:
    served: list[SandboxOptions] = []
    monkeypatch.setattr(app.sandbox, "serve", lambda options, *_: served.append(options))
    assert main(["sandbox", "--port", "0", *switches]) == 0
    assert served == [options]


def test_realtime_and_another_speed_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sandbox", "--realtime", "--speed", "2"])
    assert "not allowed with" in capsys.readouterr().err
