"""What is left of somebody: rows of whatever table, objects of a store; and rows of every table to look for it in."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import MetaData, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database, create_engine
from app.errors import StorageError
from app.models import (
    ApiKey,
    Bill,
    Enrollment,
    LongText,
    Record,
    Segment,
    SubmittedFile,
    Transcription,
    User,
    Voice,
    VoiceListing,
    VoiceSample,
)
from app.storage import LocalStorage, work_key

SECRET = "青山不改绿水长流"
"""What a user said or wrote, in every place that takes it."""

UNIT_PRICE = Decimal("0.000014335")


async def mentions(url: str, *words: str) -> list[str]:
    """Where in a database any of these words stands, whatever the table; an id in every way to write it."""
    sought = {form for word in words for form in _forms(word)}
    metadata = MetaData()
    engine = create_engine(url)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(metadata.reflect)
            found = []
            for name, table in metadata.tables.items():
                for row in await connection.execute(select(table)):
                    for column, value in row._mapping.items():
                        shown = value.decode("latin-1") if isinstance(value, bytes) else str(value)
                        if any(form in shown for form in sought):
                            found.append(f"{name}.{column}: {shown[:100]}")
    finally:
        await engine.dispose()
    return found


def _forms(word: str) -> set[str]:
    try:
        return {word, uuid.UUID(word).hex, str(uuid.UUID(word)), uuid.UUID(word).bytes.decode("latin-1")}
    except ValueError:
        return {word, json.dumps(word)[1:-1]}


class CountingStorage(LocalStorage):
    """A store that knows what was removed, and that can be away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "http://127.0.0.1:8000")
        self.folder = folder
        self.removed: list[str] = []
        self.is_away = False

    @property
    def keys(self) -> set[str]:
        """What lies in it."""
        return {file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()}

    def lay(self, key: str) -> str:
        """Have something lie there; gives its key."""
        file = self.folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"sound")
        return key

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store the source, unless the store is away."""
        if self.is_away:
            raise StorageError
        await super().put(key, source, content_type=content_type)

    async def delete(self, key: str) -> None:
        """Remove a file, and remember that, unless the store is away."""
        if self.is_away:
            raise StorageError
        await super().delete(key)
        self.removed.append(key)


async def create_user(database: Database, name: str = "") -> uuid.UUID:
    """Somebody whom rows can belong to."""
    now = datetime.now(UTC)
    user = User(username=name or SECRET, username_key=name or uuid.uuid4().hex, password_hash="-", created_at=now)
    async with database.transaction() as session:
        session.add(user)
    return user.id


async def create_key(database: Database, user_id: uuid.UUID, sealed: bytes = b"nothing that opens") -> None:
    """A stored key of somebody."""
    key = ApiKey(user_id=user_id, sealed=sealed, masked="sk-****", region="beijing", updated_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(key)


async def create_record(database: Database, user_id: uuid.UUID, *, days: float = 0, **columns: Any) -> Record:
    """A record that ended some days ago, with its bill; columns can be named."""
    at = datetime.now(UTC) - timedelta(days=days)
    values: dict[str, Any] = {
        "type": "tts",
        "model_name": "cosyvoice-v3-flash",
        "status": "succeeded",
        "input_data": json.dumps({"text": SECRET, "voice": "longanyang", "format": "mp3"}, ensure_ascii=False),
        "output_key": f"audio/tts/20260101/{uuid.uuid4()}.mp3",
        "duration_ms": 1500,
        "unit": "character",
        "unit_price": UNIT_PRICE,
        "currency": "CNY",
        "expected_quantity": 7,
        "created_at": at,
        "finished_at": at,
    }
    record = Record(user_id=user_id, **{**values, **columns})
    async with database.transaction() as session:
        session.add(record)
        await session.flush()
        if record.status != "running":
            session.add(_bill(record))
    return record


def _bill(record: Record, quantity: int = 7) -> Bill:
    return Bill(
        record_id=record.id,
        user_id=record.user_id,
        model=record.model_name,
        unit=record.unit,
        quantity=quantity,
        unit_price=record.unit_price,
        amount=quantity * record.unit_price,
        currency=record.currency,
        provider_request_id="provider-request",
        created_at=record.created_at,
    )


async def create_every_kind(database: Database, user_id: uuid.UUID, *, days: float = 0) -> list[Record]:
    """Records of every kind that ended some days ago, with something said or written wherever there is room for it."""
    said = {
        "output_text": SECRET,
        "output_data": json.dumps({"language": SECRET}),
        "error": "INVALID_AUDIO",
        "error_message": f"file_url {SECRET}",
        "idempotency_key": SECRET,
        "request_digest": SECRET,
        "planned_key": f"audio/tts/20260101/{uuid.uuid4()}.wav",
    }
    plain = await create_record(database, user_id, days=days, **said)
    heard = await create_record(database, user_id, days=days, type="asr", output_key=None, output_text=SECRET)
    text = await create_record(database, user_id, days=days)
    voice = await create_record(database, user_id, days=days, type="voice", output_key=None)
    async with database.transaction() as session:
        session.add_all(_rows_of(user_id, heard, text, voice))
        await session.flush()
    return [plain, heard, text, voice]


def _rows_of(user_id: uuid.UUID, heard: Record, text: Record, voice: Record) -> list[Any]:
    now = datetime.now(UTC)
    return [
        Transcription(
            record_id=heard.id,
            user_id=user_id,
            task_id="task",
            key_fingerprint="0" * 32,
            status="SUCCEEDED",
            submitted_at=now,
            result_url=f"https://example.com/{SECRET}",
            transcripts=json.dumps([SECRET], ensure_ascii=False),
            transcripts_with_words=json.dumps([SECRET]),
            audio_info=json.dumps({"format": SECRET}),
        ),
        LongText(
            record_id=text.id,
            user_id=user_id,
            segments_total=2,
            segments_done=2,
            characters=7,
            output_key=text.output_key or "",
            subtitle_key=f"audio/tts/20260101/{uuid.uuid4()}.srt",
        ),
        *(
            Segment(record_id=text.id, number=number, text=SECRET, cues=SECRET, key=work_key(text.id, number))
            for number in range(2)
        ),
        Enrollment(
            record_id=voice.id,
            user_id=user_id,
            account="account",
            target_model="cosyvoice-v3-flash",
            prefix="mine",
            digest=SECRET,
            voices_before=json.dumps([SECRET]),
            voice_id=f"cosyvoice-v3-flash-mine-{voice.id}",
            status="OK",
        ),
        VoiceSample(
            key=f"audio/voice/20260101/{uuid.uuid4()}.wav",
            user_id=user_id,
            record_id=voice.id,
            account="account",
            voice_id=f"cosyvoice-v3-flash-mine-{voice.id}",
        ),
    ]


async def create_voice(database: Database, account: str) -> None:
    """What is known of an account's voices."""
    now = datetime.now(UTC)
    values: dict[str, Any] = {"status": "OK", "created_at": now, "modified_at": now, "seen_at": now}
    voice = Voice(account=account, voice_id="v", target_model="cosyvoice-v3-flash", prefix="mine", **values)
    async with database.transaction() as session:
        session.add_all([voice, VoiceListing(account=account, listed_at=now)])


async def create_job(session: AsyncSession, table: type[Any], record: Record, **columns: Any) -> None:
    """Something that is still looked after for a record."""
    now = datetime.now(UTC)
    needed: dict[type[Any], dict[str, Any]] = {
        Transcription: {"task_id": "t", "key_fingerprint": "0", "status": "RUNNING", "submitted_at": now},
        SubmittedFile: {"key_fingerprint": "0", "file_url": f"https://example.com/{SECRET}"},
        LongText: {"segments_total": 1, "output_key": f"audio/tts/20260101/{uuid.uuid4()}.mp3"},
        Enrollment: {
            "account": "a", "target_model": "m", "prefix": "p", "digest": SECRET, "voices_before": "null",
        },
    }  # fmt: skip
    values = {"record_id": record.id, "user_id": record.user_id, "next_check_at": now, **needed[table], **columns}
    session.add(table(**values))
