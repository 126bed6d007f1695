"""Connections carry one task after the other, and bad ones are replaced unnoticed."""

import asyncio
import json
from dataclasses import replace

import pytest

from app.dashscope import ConnectionPool
from app.errors import UpstreamError
from tests.dashscope.provider import AUDIO, Call, Provider, Script, happened, in_turn, sends, speaks
from tests.dashscope.speaker import Speaker


async def test_the_next_task_uses_the_same_connection_with_a_new_id(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(speaks(b"one"), speaks(b"two", characters=6), speaks(b"three")))
    assert [await speaker.say() for _ in range(3)] == [b"one", b"two", b"three"]
    task_ids = [message["header"]["task_id"] for message in provider.messages]
    first, second, third = task_ids[0], task_ids[3], task_ids[6]
    assert task_ids == [first] * 3 + [second] * 3 + [third] * 3
    assert len({first, second, third}) == 3
    assert len(provider.handshakes) == 1


async def test_a_verified_connection_serves_the_first_task(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks())
    await speaker.verify()
    assert await speaker.say() == AUDIO


async def test_tasks_at_the_same_time_have_connections_of_their_own(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(speaks(), speaks()), in_turn(speaks(), speaks()))
    for _ in range(2):
        await asyncio.gather(speaker.say(), replace(speaker).say())
    assert len(provider.handshakes) == 2


@pytest.mark.parametrize("change", [{"api_key": "sk-test-2"}, {"workspace": "ws-2"}])
async def test_connections_are_not_shared_between_credentials(
    provider: Provider, speaker: Speaker, change: dict[str, str]
) -> None:
    provider.expect(speaks(), speaks())
    await speaker.say()
    await replace(speaker, credential=replace(speaker.credential, **change)).say()
    assert len(provider.handshakes) == 2


async def test_connections_are_not_shared_between_endpoints(
    provider: Provider, other_provider: Provider, speaker: Speaker
) -> None:
    provider.expect(speaks(b"here"))
    other_provider.expect(speaks(b"there"))
    assert await speaker.say() == b"here"
    elsewhere = replace(speaker.credential, ws_url=other_provider.url)
    assert await replace(speaker, credential=elsewhere).say() == b"there"


async def test_an_idle_connection_is_closed_by_us_first(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks(), speaks())
    short_lived = replace(speaker, pool=ConnectionPool(handshake_seconds=5, idle_seconds=0.02))
    await short_lived.say()
    assert await provider.calls[0].ended() == 1000
    await short_lived.say()
    await short_lived.pool.close()


async def test_a_busy_connection_is_never_idle(provider: Provider, speaker: Speaker) -> None:
    async def slowly(call: Call) -> None:
        await call.start_and_hear_text()
        await call.audio()
        await asyncio.sleep(0.2)
        await call.finish()

    provider.expect(in_turn(speaks(), slowly))
    short_lived = replace(speaker, pool=ConnectionPool(handshake_seconds=5, idle_seconds=0.1))
    await short_lived.say()
    assert await short_lived.say() == AUDIO
    await short_lived.pool.close()


async def test_no_more_idle_connections_are_kept_than_the_bound(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.pool.MAX_IDLE_PER_CREDENTIAL", 1)
    provider.expect(speaks(), speaks())
    async with speaker.speak() as first, replace(speaker).speak() as second:
        for task in (first, second):
            async for _ in task.audio():
                pass
    done, still_open = await asyncio.wait(
        [asyncio.create_task(call.ended()) for call in provider.calls], return_when=asyncio.FIRST_COMPLETED
    )
    assert (len(done), len(still_open)) == (1, 1)
    await speaker.pool.close()
    await asyncio.wait(still_open)


async def silent(call: Call) -> None:
    await call.hear_run_task()


async def speaks_of_another_task_only(call: Call) -> None:
    await call.hear_run_task()
    while True:
        await call.event("result-generated", task_id="another")
        await asyncio.sleep(0.05)


async def finishes_a_task_that_never_began(call: Call) -> None:
    await call.hear_run_task()
    await call.finish()


DEAD_AFTER_A_TASK = {
    "closed while idle": Call.hang_up,
    "cut while idle": Call.drop,
    "closed upon run-task": in_turn(Call.hear_run_task, Call.hang_up),
    "cut upon run-task": in_turn(Call.hear_run_task, Call.drop),
    "silent upon run-task": silent,
    "never done with another task": speaks_of_another_task_only,
    "audio before task-started": in_turn(Call.hear_run_task, sends(b"late audio")),
    "audio left over from the task before": sends(b"late audio"),
    "task-finished before task-started": finishes_a_task_that_never_began,
    "broken frame": in_turn(Call.hear_run_task, lambda call: call.send_raw(b"\xff\xff\xff")),
    "text that is not JSON": in_turn(Call.hear_run_task, sends("<html>bad gateway</html>")),
    "JSON that is not an event": in_turn(Call.hear_run_task, sends("[]")),
}


@pytest.mark.parametrize("death", DEAD_AFTER_A_TASK.values(), ids=DEAD_AFTER_A_TASK.keys())
async def test_a_reused_connection_that_is_dead_is_replaced_once_and_unnoticed(
    provider: Provider, impatient: Speaker, death: Script
) -> None:
    provider.expect(in_turn(speaks(b"one"), death), speaks(b"two", characters=6, request_id="req-2"))
    assert await impatient.say("第一句") == b"one"
    assert await impatient.say("第二句") == b"two"
    assert (impatient.usage.characters, impatient.usage.request_id) == (6, "req-2")
    await impatient.pool.close()
    await provider.all_ended()
    assert provider.texts == ["第一句", "第二句"]
    assert len(provider.handshakes) == 2


async def test_a_silent_reused_connection_is_given_up_sooner_than_a_fresh_one(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.speech_task.REUSED_START_SECONDS", 0.1)
    provider.expect(in_turn(speaks(), silent), speaks(b"two"))
    await speaker.say()
    async with asyncio.timeout(speaker.silence_seconds / 2):
        assert await speaker.say() == b"two"


async def test_forgetting_a_key_closes_its_idle_connections_only(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks(), speaks(), in_turn(speaks(), speaks()))
    in_workspace = replace(speaker, credential=replace(speaker.credential, workspace="ws-1"))
    stranger = replace(speaker, credential=replace(speaker.credential, api_key="sk-test-stranger"))
    for each in (speaker, in_workspace, stranger):
        await each.say()
    speaker.pool.forget("sk-test-1")
    assert [await provider.calls[0].ended(), await provider.calls[1].ended()] == [1000, 1000]
    assert await stranger.say() == AUDIO
    assert len(provider.handshakes) == 3


async def test_forgetting_a_key_without_connections_is_harmless(speaker: Speaker) -> None:
    speaker.pool.forget("sk-test-unknown")


async def test_closing_the_pool_leaves_nothing_open(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Call.start_and_hear_text, speaks(), speaks())
    unfinished = asyncio.create_task(replace(speaker).say())
    await asyncio.gather(speaker.say(), replace(speaker).say())
    unfinished.cancel()
    await asyncio.wait({unfinished})
    await speaker.pool.close()
    async with asyncio.timeout(1):
        await provider.all_ended()


async def test_closing_the_pool_does_not_wait_for_a_provider_that_never_stops(
    provider: Provider, speaker: Speaker
) -> None:
    async def floods(call: Call) -> None:
        await call.start_and_hear_text()
        while True:
            await call.audio(bytes(60_000))

    provider.expect(floods)
    async with speaker.speak():
        pass
    async with asyncio.timeout(2):
        await speaker.pool.close()
        await provider.all_ended()


async def test_a_connection_is_not_reused_after_a_failed_task(provider: Provider, speaker: Speaker) -> None:
    async def fails_and_stays(call: Call) -> None:
        await call.start_and_hear_text()
        await call.event("task-failed", error_code="InternalError", error_message="")

    provider.expect(fails_and_stays, speaks(b"two"))
    with pytest.raises(UpstreamError):
        await speaker.say()
    assert await speaker.say() == b"two"


async def test_a_connection_is_not_reused_after_an_unfinished_task(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.audio), speaks(b"two"))
    async with speaker.speak() as task:
        assert await anext(task.audio()) == AUDIO
    assert await provider.calls[0].ended() == 1000
    assert await speaker.say() == b"two"


async def test_a_connection_is_not_reused_after_the_block_has_failed(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.audio), speaks(b"two"))
    with pytest.raises(ZeroDivisionError):
        async with speaker.speak():
            raise ZeroDivisionError
    assert await speaker.say() == b"two"


@pytest.mark.parametrize("until", [silent, Call.start_and_hear_text, in_turn(Call.start_and_hear_text, Call.audio)])
async def test_a_connection_is_not_reused_after_its_reader_was_cancelled(
    provider: Provider, speaker: Speaker, until: Script
) -> None:
    reached = asyncio.Event()

    async def script(call: Call) -> None:
        await until(call)
        reached.set()

    provider.expect(script, speaks(b"two"))
    reading = asyncio.create_task(speaker.say())
    await happened(reached)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await provider.calls[0].ended()
    assert await speaker.say() == b"two"


async def test_late_events_of_an_earlier_task_are_ignored(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await speaks(b"one")(call)
        earlier = call.task_id
        await call.hear_run_task()
        for name in ("result-generated", "task-failed", "task-finished"):
            await call.event(name, {"usage": {"characters": 99}}, task_id=earlier, error_code="InternalError")
        await call.send(json.dumps({"header": {"event": "task-started"}}))
        await call.hear_text()
        await call.audio(b"two")
        await call.finish(characters=6)

    provider.expect(script)
    await speaker.say()
    assert await speaker.say() == b"two"
    assert speaker.usage.characters == 6
