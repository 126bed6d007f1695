"""What has to be true of a cluster once everything is quiet: every breach of it, in words."""

import asyncio
import hashlib
import json
import random
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx

from tests.cluster.calls import call
from tests.cluster.load import SENTENCES, Load, Outcome
from tests.cluster.topology import SECRETS, Cluster
from tests.faults import BUCKET
from tests.narrating import counted
from tests.servers import NO_AUTHORITIES
from tests.sound import duration

Calls = list[dict[str, Any]]

_RECORDS = (
    "SELECT records.id, records.user_id, records.status, records.input_data, records.output_key, records.duration_ms,"
    " records.finished_at, coalesce(bills.quantity, 0), coalesce(bills.estimated, false), coalesce(bills.amount, 0),"
    " records.unit_price, long_texts.segments_total, long_texts.segments_done"
    " FROM records LEFT JOIN bills ON bills.record_id = records.id"
    " LEFT JOIN long_texts ON long_texts.record_id = records.id ORDER BY records.id"
)
_OPEN_WORK = (
    "SELECT record_id FROM long_texts WHERE claimed_by IS NOT NULL OR next_check_at IS NOT NULL"
    " UNION SELECT record_id FROM segments"
)
# How long before its death a worker may have finished a segment without having written that down.
UNSETTLED_SECONDS = 2.0
BESIDE_SECONDS = 0.5
# How long after the last byte of a stream its record may still be open.
SETTLING_SECONDS = 5.0
# What the server says when an answer is broken off; whether it had to be, clients tell.
EXPECTED_ERRORS = ("ASGI callable returned without completing response.", "timeout graceful shutdown exceeded")


@dataclass(frozen=True)
class Entry:
    """A record with its bill."""

    id: int
    user_id: uuid.UUID
    status: str
    input_data: str
    output_key: str | None
    duration_ms: int | None
    finished_at: datetime | None
    billed: int
    is_estimated: bool
    amount: Decimal
    unit_price: Decimal
    segments_total: int | None
    segments_done: int | None

    @property
    def text(self) -> str:
        """What was to be spoken."""
        return str(json.loads(self.input_data)["text"])


async def entries_of(cluster: Cluster) -> list[Entry]:
    """All records, the oldest first."""
    return [Entry(*row) for row in await cluster.rows(_RECORDS)]


async def is_quiet(cluster: Cluster) -> bool:
    """Whether nobody works on anything any more."""
    running = await cluster.rows("SELECT id FROM records WHERE status = 'running'")
    if running or await cluster.rows(_OPEN_WORK):
        return False
    ledger = await asyncio.to_thread(cluster.sandbox.ledger)
    return all(work["ended"] for work in ledger)


class Verdict:
    """Compares what clients saw, what is on record, and what the provider counted."""

    def __init__(self, cluster: Cluster, load: Load, stopped: list[tuple[str, float, float]]) -> None:
        """`stopped` names the addresses of processes that were ended in order, and from when to when that was."""
        self._cluster = cluster
        self._load = load
        self._stopped = stopped
        self._users = {user.id: user for user in load.users}
        self.breaches: list[str] = []
        self.entries: list[Entry] = []
        self.played = 0

    async def reach(self, sample: int) -> None:
        """Check everything; `sample` is how many recordings are played."""
        self.entries = await entries_of(self._cluster)
        ledger = await asyncio.to_thread(self._cluster.sandbox.ledger)
        calls = await asyncio.to_thread(self._cluster.sandbox.calls)
        counts = {work["id"]: work["counted"] for work in ledger}
        for each in calls:
            each["counted"] = counts.get(each["task_id"], 0)
        await self._check_ends()
        self._check_purchases([each for each in calls if each["text"]])
        self._check_sums(ledger)
        self._check_successes()
        self._check_failures()
        await self._check_audio(sample)
        await self._check_work()
        self._check_logs()

    async def _check_ends(self) -> None:
        for entry in self.entries:
            if entry.status not in {"succeeded", "failed", "interrupted", "abandoned"}:
                self._breach(f"record {entry.id} is {entry.status}")
        for (record_id,) in await self._cluster.rows(_OPEN_WORK):
            self._breach(f"something is left to be done for record {record_id}")

    def _check_purchases(self, calls: Calls) -> None:
        """Each text was bought once, and what was bought is billed."""
        bought: dict[tuple[str, str], Calls] = defaultdict(list)
        long_texts = {entry.id: entry for entry in self.entries if entry.segments_total is not None}
        pieces: dict[int, Calls] = defaultdict(list)
        owners: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            owners[self._key(entry), entry.text].append(entry)
        narrated = [(self._key(entry), entry) for entry in long_texts.values()]
        for each in calls:
            if (each["api_key"], each["text"]) in owners:
                bought[each["api_key"], each["text"]].append(each)
                continue
            parents = [entry for key, entry in narrated if key == each["api_key"] and each["text"] in entry.text]
            if len(parents) == 1:
                pieces[parents[0].id].append(each)
            else:
                self._breach(f"{len(parents)} records for task {each['task_id']}")
        for asked, entries in owners.items():
            if entries[0].segments_total is None:
                self._check_purchase(entries, bought[asked])
        for record_id, entry in long_texts.items():
            self._check_segments(entry, pieces[record_id] + bought[self._key(entry), entry.text])

    def _check_purchase(self, entries: list[Entry], calls: Calls) -> None:
        seen = (
            f"records {[(entry.id, entry.status, entry.billed, entry.is_estimated) for entry in entries]},"
            f" tasks {[(each['outcome'], each['counted']) for each in calls]}"
        )
        billed, provider = sum(entry.billed for entry in entries), sum(each["counted"] for each in calls)
        if sum(each["counted"] > 0 for each in calls) > 1:
            self._breach(f"bought twice: {seen}")
        if any(entry.is_estimated for entry in entries):
            if not provider <= billed <= counted(entries[0].text) * len(entries):
                self._breach(f"estimated wrongly: {seen}")
            if any(entry.is_estimated and entry.status != "interrupted" for entry in entries):
                self._breach(f"estimated although nobody died: {seen}")
        elif billed != provider:
            self._breach(f"billed wrongly: {seen}")

    def _check_segments(self, entry: Entry, calls: Calls) -> None:
        about = f"long text {entry.id}"
        if entry.status != "succeeded" or entry.segments_done != entry.segments_total:
            self._breach(f"{about} is {entry.status} with {entry.segments_done} of {entry.segments_total} segments")
        by_text: dict[str, Calls] = defaultdict(list)
        for each in calls:
            by_text[each["text"]].append(each)
        if len(by_text) != entry.segments_total or sum(map(len, by_text)) != len(entry.text):
            self._breach(f"{about}: the provider saw {len(by_text)} segments of {entry.segments_total}")
        for tries in by_text.values():
            finished = [each for each in tries if each["outcome"] == "finished"]
            if not finished:
                self._breach(f"{about}: a segment was never finished")
            for again in sorted(finished, key=lambda each: str(each["ended_at"]))[:-1]:
                died_at = [at for at in self._cluster.worker.killed_at if at >= again["submitted_at"]]
                if not any(at - again["ended_at"] <= UNSETTLED_SECONDS for at in died_at):
                    self._breach(f"{about}: a segment was bought again that was finished at {again['ended_at']}")
        provider = sum(each["counted"] for each in calls)
        if not (provider <= entry.billed if entry.is_estimated else provider == entry.billed):
            self._breach(f"{about} is billed {entry.billed}, counted {provider}, estimated {entry.is_estimated}")

    def _check_sums(self, ledger: Calls) -> None:
        counts: dict[str, int] = defaultdict(int)
        for work in ledger:
            counts[work["api_key"]] += work["counted"]
        by_key: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            by_key[self._key(entry)].append(entry)
            if entry.amount != entry.billed * entry.unit_price:
                self._breach(f"record {entry.id} costs {entry.amount} for {entry.billed} at {entry.unit_price}")
        for key in counts.keys() | by_key.keys():
            billed = sum(entry.billed for entry in by_key[key])
            is_exact = not any(entry.is_estimated for entry in by_key[key])
            if billed < counts[key] or (is_exact and billed != counts[key]):
                self._breach(f"user {self._number(key)} is billed {billed}, the provider counted {counts[key]}")

    def _check_successes(self) -> None:
        entries = {entry.id: entry for entry in self.entries}
        for outcome in self._load.outcomes:
            if not outcome.succeeded or outcome.kind == "poll":
                continue
            entry = entries.get(outcome.record_id or 0)
            if entry is None or entry.user_id != outcome.user.id or entry.text != outcome.text:
                self._breach(f"a {outcome.kind} succeeded without its record {outcome.record_id}")
            elif entry.status != "succeeded" and not self._died_before_it_was_settled(outcome, entry):
                self._breach(f"a {outcome.kind} succeeded, its record {entry.id} is {entry.status}")
            elif not entry.is_estimated and entry.billed != counted(outcome.text):
                self._breach(f"record {entry.id} is billed {entry.billed} instead of {counted(outcome.text)}")
            if not outcome.size and outcome.kind in {"stream", "named", "live"}:
                self._breach(f"record {outcome.record_id} was heard without a byte")

    def _died_before_it_was_settled(self, outcome: Outcome, entry: Entry) -> bool:
        """Whether a process died between the last byte of a stream and the end of its record: a slow store is not
        waited for by clients. The bill is an estimate then, of all that was said."""
        deaths = [at for member in self._cluster.backends for at in member.killed_at]
        is_right = entry.status == "interrupted" and entry.billed == counted(outcome.text)
        return is_right and any(-BESIDE_SECONDS < at - outcome.ended < SETTLING_SECONDS for at in deaths)

    def _check_failures(self) -> None:
        """Nobody saw a failure but those whose connection was to a process that was ended at that moment."""
        asked = {str(line["request_id"]): line for line in self._cluster.proxy.requests}
        for outcome in self._load.outcomes:
            if outcome.succeeded or outcome.kind == "long" or self._is_excused(outcome, asked):
                continue
            line = asked.get(outcome.request_id, {})
            where = f"{line.get('upstream_addr')} {line.get('upstream_status')}"
            took = f"{outcome.began:.1f} to {outcome.ended:.1f}"
            self._breach(f"a {outcome.kind} of user {outcome.user.number} got {outcome.brief}, {took}: {where}")

    def _is_excused(self, outcome: Outcome, asked: dict[str, dict[str, Any]]) -> bool:
        told = str(asked.get(outcome.request_id, {}).get("upstream_addr", "")).split(", ")
        for member in (*self._cluster.backends, self._cluster.worker):
            ends = [at for at in member.killed_at if _overlaps(outcome, at, at)]
            if member.address in told and ends:
                return True
        stops = [times for address, *times in self._stopped if address in told]
        if outcome.kind in {"live", "named"} and any(_overlaps(outcome, *times) for times in stops):
            return True  # who waits, or speaks on, is told to come back
        if outcome.is_repeat:  # whose first try died, and is told so
            mine = [each for each in self.entries if each.user_id == outcome.user.id and each.text == outcome.text]
            return any(entry.status == "interrupted" for entry in mine)
        return False

    async def _check_audio(self, sample: int) -> None:
        """What is stored plays for as long as is said, and is what was heard."""
        heard = {outcome.record_id: outcome for outcome in self._load.outcomes if outcome.succeeded}
        kept = [entry for entry in self.entries if entry.output_key]
        for entry in self.entries:
            if entry.status == "succeeded" and not entry.output_key:
                self._breach(f"record {entry.id} succeeded without audio")
        chosen = random.sample(kept, min(sample, len(kept)))
        chosen += [entry for entry in kept if entry.segments_total is not None and entry not in chosen]
        async with httpx.AsyncClient(timeout=30, trust_env=False, verify=NO_AUTHORITIES) as player:
            for entry in chosen:
                user = self._users[entry.user_id]
                path = f"/api/audio/records/{entry.id}"
                answer = await call(self._cluster.proxy.port, "GET", path, user.headers)
                if answer.status == 429:  # he may ask no more in this minute
                    url = f"{self._cluster.sandbox.url}/{BUCKET}/{entry.output_key}"
                else:
                    url = answer.data["output_url"]
                await self._play(player, entry, url, heard.get(entry.id))

    async def _play(self, player: httpx.AsyncClient, entry: Entry, url: str, heard: Outcome | None) -> None:
        fetched = await player.get(url)
        if fetched.status_code != 200:
            self._breach(f"record {entry.id}: {url} answers {fetched.status_code}")
            return
        self.played += 1
        asked = json.loads(entry.input_data)
        seconds = duration(fetched.content, url.rpartition(".")[2], asked.get("sample_rate", 22050))
        if entry.duration_ms is None or abs(seconds - entry.duration_ms / 1000) > 0.1:
            self._breach(f"record {entry.id} plays {seconds} s instead of {entry.duration_ms} ms")
        is_comparable = heard is not None and heard.kind in {"stream", "named"} and not url.endswith("wav")
        if is_comparable and heard and hashlib.sha256(fetched.content).hexdigest() != heard.digest:
            self._breach(f"record {entry.id}: what is stored is not what was heard")

    async def _check_work(self) -> None:
        """Nothing of the work on long texts lies about."""
        for entry in self.entries:
            for number in range(entry.segments_total or 0):
                path = f"/{BUCKET}/audio/work/{entry.id}-{number}.pcm"
                answer = await call(int(self._cluster.sandbox.url.rpartition(":")[2]), "GET", path, {})
                if answer.status != 404:
                    self._breach(f"{path} is left, or was never known: {answer.status}")

    def _check_logs(self) -> None:
        texts = (*SENTENCES, "好。")
        secrets = [*SECRETS, "Signature=", "token=", *texts]
        for user in self._load.users:
            secrets += [user.api_key, user.token]
        for name, log in self._cluster.logs.items():
            told = [secret for secret in secrets if secret in log]
            if told:
                self._breach(f"the log of {name} tells {len(told)} secrets, such as {told[0]}")
            for what in unexpected_lines(log):
                self._breach(f"the log of {name}: {what}")

    def _key(self, entry: Entry) -> str:
        return self._users[entry.user_id].api_key

    def _number(self, key: str) -> int:
        return next((user.number for user in self._load.users if user.api_key == key), -1)

    def _breach(self, what: str) -> None:
        self.breaches.append(what)


def unexpected_lines(log: str) -> Iterable[str]:
    """Lines that tell of a bug: errors, and what Python itself complains of."""
    for line in log.splitlines():
        if any(expected in line for expected in EXPECTED_ERRORS):
            continue
        if '"exc_type"' in line or '"level": "error"' in line or re.search(r"Traceback|never retrieved|Warning", line):
            yield line[:600]


def _overlaps(outcome: Outcome, begin: float, end: float) -> bool:
    return outcome.began - BESIDE_SECONDS <= end and begin <= outcome.ended + BESIDE_SECONDS
