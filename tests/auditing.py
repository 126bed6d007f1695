"""The audit that follows whatever went wrong.

Every record has its end, the bills are what the provider counted, what was kept can be played, nothing lies about, and
the log tells no secret. What the provider counted of a sentence in which it broke off, it never tells (counts come with
the end of a sentence): that part alone may be missing in a bill.
"""

import itertools
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.conftest import Account
from tests.faults import BUCKET, OSS_SECRET, SAMPLE_RATE, Scene, until
from tests.narrating import counted
from tests.servers import Server
from tests.sound import duration
from tests.talking import token_of
from tests.tunnels import Tunnel

SEARCH_SECONDS = 2.0

Calls = list[dict[str, Any]]


class Entry(NamedTuple):
    """A record with its bill."""

    id: int
    type: str
    status: str
    input_data: str
    output_key: str | None
    quantity: int | None
    estimated: bool | None
    provider_id: str | None

    @property
    def text(self) -> str:
        """What was to be spoken."""
        return str(json.loads(self.input_data).get("text", ""))

    @property
    def billed(self) -> int:
        """The quantity of the bill line, 0 where there is none."""
        return self.quantity or 0


@dataclass
class Findings:
    """What the audit went through."""

    entries: list[Entry]
    calls: Calls
    ledger: Calls

    @property
    def statuses(self) -> list[str]:
        """How the records ended, the oldest first."""
        return [entry.status for entry in self.entries]

    @property
    def bills(self) -> list[tuple[int, bool]]:
        """Each bill's quantity, and whether it is an estimate; 0 where there is none."""
        return [(entry.billed, bool(entry.estimated)) for entry in self.entries]

    @property
    def counted(self) -> int:
        """What the provider counted, voices left out."""
        return sum(work["counted"] for work in self.ledger if work["kind"] != "enrollment")


_ENTRIES = (
    "SELECT records.id, type, records.status, input_data, output_key, quantity, estimated, provider_request_id"
    " FROM records LEFT JOIN bills ON bills.record_id = records.id"
    " WHERE replace(CAST(records.user_id AS TEXT), '-', '') = $1 ORDER BY records.id"
)
_OPEN_TASKS = (
    "SELECT task_id FROM transcriptions JOIN records ON records.id = record_id"
    " WHERE replace(CAST(records.user_id AS TEXT), '-', '') = $1 AND next_check_at IS NOT NULL"
)
_OPEN_TEXTS = (
    "SELECT 1 FROM long_texts JOIN records ON records.id = record_id"
    " WHERE replace(CAST(records.user_id AS TEXT), '-', '') = $1"
    " AND (claimed_by IS NOT NULL OR next_check_at IS NOT NULL)"
)
_OPEN_TRIES = (
    "SELECT 1 FROM segments JOIN records ON records.id = record_id"
    " WHERE replace(CAST(records.user_id AS TEXT), '-', '') = $1 AND attempt IS NOT NULL"
)
_FOUND_TASKS = "SELECT task_id FROM transcriptions"
_HURRY_SEARCH = (
    "UPDATE submitted_files SET next_check_at = (SELECT created_at FROM records WHERE records.id = record_id)"
    " WHERE next_check_at IS NOT NULL AND claimed_by IS NULL"
)
_LED_TO = "SELECT output_key FROM records UNION SELECT subtitle_key FROM long_texts UNION SELECT key FROM voice_samples"
_HURRY_CHECKS = "UPDATE transcriptions SET checked_at = NULL WHERE next_check_at IS NOT NULL AND claimed_by IS NULL"
_HURRY_CLEARING = (
    "UPDATE long_texts SET next_check_at = (SELECT created_at FROM records WHERE records.id = record_id)"
    " WHERE next_check_at IS NOT NULL AND claimed_by IS NULL"
)


async def audit(scene: Scene, *accounts: Account, surprises: bool = False) -> Findings:
    """Check everything that has to be true once what went wrong is over; gives what was found of all accounts.

    `surprises` allows errors in the log that name their place.
    """
    whole = Findings([], [], [])
    for account in accounts:
        found = await _settled(scene, account)
        _check_speech(found)
        _check_hearing(found)
        voices = [entry for entry in found.entries if entry.type == "voice" and entry.status == "succeeded"]
        assert len(scene.sandbox.voices(account.api_key)) == len(voices)
        await _check_audio(account)
        whole.entries += found.entries
        whole.calls += found.calls
        whole.ledger += found.ledger
    await _check_store(scene)
    await until(lambda: not _open_spools(scene.server), "a temporary file is still open")
    _check_log(scene, accounts, whole.entries, surprises=surprises)
    return whole


async def _settled(scene: Scene, account: Account) -> Findings:
    """Wait until every record of an account has its end, and nothing is left to be done for it."""
    owner = account.user_id.replace("-", "")

    async def nothing_is_open() -> bool:
        for (task_id,) in await scene.rows(_OPEN_TASKS, owner):
            await scene.rows(_HURRY_CHECKS)
            await account.client.get(f"/api/audio/asr/task/{task_id}")
        await scene.rows(_HURRY_CLEARING)
        left = [await scene.rows(sql, owner) for sql in (_OPEN_TASKS, _OPEN_TEXTS, _OPEN_TRIES)]
        return not any(left) and all(row[2] != "running" for row in await scene.rows(_ENTRIES, owner))

    async def provider_is_at_rest() -> bool:
        return all(work["ended"] for work in scene.sandbox.ledger(account.api_key))

    hurry_at = 0.0

    async def lost_tasks_are_found() -> bool:
        nonlocal hurry_at
        found = {task_id for (task_id,) in await scene.rows(_FOUND_TASKS)}
        tasks = {work["id"] for work in scene.sandbox.ledger(account.api_key) if work["kind"] == "transcription"}
        if tasks - found and time.monotonic() >= hurry_at:
            hurry_at = time.monotonic() + SEARCH_SECONDS
            await scene.rows(_HURRY_SEARCH)
        return tasks <= found

    await until(provider_is_at_rest, "the provider still works")
    await until(lost_tasks_are_found, "the provider has a task that nobody knows of")
    await until(nothing_is_open, "a record has no end, or a job goes on")
    await until(provider_is_at_rest, "the provider works again")
    entries = [Entry(*row) for row in await scene.rows(_ENTRIES, owner)]
    assert {entry.status for entry in entries} <= {"succeeded", "failed", "cancelled", "abandoned", "interrupted"}
    calls = [call for call in scene.sandbox.calls(account.api_key) if call["text"]]
    return Findings(entries, calls, scene.sandbox.ledger(account.api_key))


def _check_speech(found: Findings) -> None:
    counts = {work["id"]: work["counted"] for work in found.ledger if work["kind"] == "speech"}
    spoken = [entry for entry in found.entries if entry.type == "tts"]
    by_entry: dict[int, Calls] = {entry.id: [] for entry in spoken}
    for call in found.calls:
        owners = [entry for entry in spoken if call["text"] in entry.text]
        assert len(owners) == 1, f"{len(owners)} records for a task that counted {counts.get(call['task_id'])}"
        by_entry[owners[0].id].append(call)
    for entry in spoken:
        calls = by_entry[entry.id]
        provider = sum(counts.get(call["task_id"], 0) for call in calls)
        seen = (entry, [(call["outcome"], counts.get(call["task_id"])) for call in calls])
        text = counted(entry.text)
        if entry.estimated:
            assert max(provider, 1) <= entry.billed <= text * max(1, len(calls)), seen
            assert entry.billed == text or any(call["text"] != entry.text for call in calls), seen
        elif entry.status == "interrupted":
            assert entry.billed == provider, seen
        else:
            possible = [_may_be_told(call, counts.get(call["task_id"], 0)) for call in calls]
            assert entry.billed in {sum(each) for each in itertools.product(*possible)}, seen


def _may_be_told(call: dict[str, Any], count: int) -> set[int]:
    """What the client may have been told of a count: all, but for the sentence in which the provider broke off."""
    if call["outcome"] in {"finished", "cancelled"}:
        return {count}
    sentences = [counted(sentence) for sentence in re.findall(r".+?(?:。\n*|$)", call["text"], re.DOTALL)]
    told_of = [sum(sentences[:number]) for number in range(len(sentences) + 1)]
    whole = [each for each in told_of if each <= count]
    if call["outcome"] == "disconnected":  # we hung up, on what made no sense: nobody knows how far the provider was
        return set(whole)
    return set(whole[-2:] if whole[-1] == count else whole[-1:])


def _check_hearing(found: Findings) -> None:
    heard = [entry for entry in found.entries if entry.type == "asr"]
    exact = {entry.provider_id: entry.billed for entry in heard if entry.billed and not entry.estimated}
    work = [each for each in found.ledger if each["kind"] in {"recognition", "transcription"} and each["counted"]]
    counts = {each["id"]: each["counted"] for each in work}
    assert exact.items() <= counts.items(), (heard, work)
    guesses = sorted((entry.billed for entry in heard if entry.estimated), reverse=True)
    unclear = sorted((counts[name] for name in counts.keys() - exact.keys()), reverse=True)
    covered = [count for count, guess in zip(unclear, guesses, strict=False) if count <= guess]
    assert covered == unclear, (heard, work)


async def play(account: Account, url: str) -> httpx.Response:
    """Fetch audio as a player does: without a login, following where it leads."""
    answer = await account.client.get(url, headers={"Authorization": ""}, follow_redirects=True)
    assert answer.status_code == 200, (url, answer.status_code, answer.text[:200])
    assert answer.content, url
    return answer


async def _check_audio(account: Account) -> None:
    items = (await account.history(page_size=100))["items"]
    for item in items:
        status = item.get("status", "succeeded")
        if url := item.get("output_url"):
            answer = await play(account, url)
            if item["type"] == "tts" and status == "succeeded":
                rate = json.loads(item["input_data"]).get("sample_rate", SAMPLE_RATE)
                assert abs(duration(answer.content, url.rpartition(".")[2], rate) - item["duration"]) < 0.1, item
        else:
            assert item["type"] != "tts" or status != "succeeded", item


async def _check_store(scene: Scene) -> None:
    """Wait until everything in the store is what a record leads to."""
    left: set[str] = set()

    async def is_tidy() -> bool:
        nonlocal left
        led_to = {key for (key,) in await scene.rows(_LED_TO) if key}
        stored = scene.media if scene.store is None else await _in_bucket(scene.store, led_to | scene.before)
        left = stored - led_to - scene.before | scene.held
        return not left

    try:
        await until(is_tidy, "")
    except AssertionError:
        raise AssertionError(f"the store has what no record leads to: {left}") from None


async def _in_bucket(store: Tunnel, but: set[str]) -> set[str]:
    """The keys that were ever put into the bucket and are still there."""
    put = {key for key in store.put_keys if key not in but}
    async with httpx.AsyncClient(base_url=store.url, trust_env=False) as client:
        return {key for key in put if (await client.get(f"/{BUCKET}/{key}")).status_code != 404}


def _open_spools(server: Server) -> list[str]:
    """The temporary files that a process has open: they have no name any more."""
    opened = []
    for descriptor in Path(f"/proc/{server.process.pid}/fd").glob("*"):
        try:
            opened.append(descriptor.readlink().as_posix())
        except FileNotFoundError:
            continue
    return [path for path in opened if path.endswith("(deleted)")]


def _check_log(scene: Scene, accounts: Sequence[Account], entries: Iterable[Entry], *, surprises: bool) -> None:
    log = scene.log
    secrets = [OSS_SECRET, "Signature="]
    secrets += [secret for account in accounts for secret in (account.api_key, token_of(account))]
    secrets += [sentence for entry in entries for sentence in entry.text.split("。") if len(sentence) > 4]
    told_secrets = [secret for secret in secrets if secret in log]
    assert not told_secrets, told_secrets
    assert surprises or "exc_type" not in log, log[log.index("exc_type") - 500 :][:3000]
    assert "never retrieved" not in log
    assert "ResourceWarning" not in log
