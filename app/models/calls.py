"""Paid calls: their records and bills, and the work behind those that take longer than an answer."""

import uuid
from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, String, Text, Uuid, text
from sqlalchemy.orm import Mapped, mapped_column

from app.columns import Money, UtcDateTime
from app.models.table import PROVIDER_ID_CHARS, Table

_UNERASED = text("erased_at IS NULL")
_RUNNING = text("status = 'running'")
_NAMED = text("idempotency_key IS NOT NULL")


class Record(Table):
    """One paid call, from before the provider is asked until its end is known.

    `status` starts as `running` and ends, once, as `succeeded`, `failed`, `cancelled` (by the user), `abandoned` (the
    client left) or `interrupted` (we died). `unit_price` is the price per unit that the call was opened with,
    `expected_quantity` what the work that was handed over will count in all. `lease_expires_at` is renewed by the
    living process that works on the record; when it has passed, nobody does. A job's record has no lease:
    whichever process works on the job next ends it. `output_data` is JSON of whatever else was found out.

    Right before the provider may take work on, `sent_at` is written, and `planned_key`: where the audio will be kept.
    `reserved` is what the user's budget holds back for the call while it runs. `idempotency_key` is the client's name
    for his request, of which `request_digest` is the content. Since `erased_at`, the record tells nothing of what was
    said or written: only how it was done and what it cost.
    """

    __tablename__ = "records"
    __table_args__ = (
        # Pages and totals of the history are told by these alone; a type beside a model is looked for within the last.
        Index("ix_records_history", "user_id", "created_at", "id"),
        Index("ix_records_history_by_type", "user_id", "type", "created_at", "id"),
        Index("ix_records_history_by_model", "user_id", "model_name", "created_at", "id", "type"),
        Index("ix_records_running", "user_id", "created_at", sqlite_where=_RUNNING, postgresql_where=_RUNNING),
        Index("ix_records_status_lease_expires_at", "status", "lease_expires_at"),
        Index(
            "uq_records_user_id_idempotency_key",
            *("user_id", "idempotency_key"),
            unique=True,
            sqlite_where=_NAMED,
            postgresql_where=_NAMED,
        ),
        Index("ix_records_finished_at", "finished_at", sqlite_where=_UNERASED, postgresql_where=_UNERASED),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    type: Mapped[str] = mapped_column(String(8))
    model_name: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    input_data: Mapped[str] = mapped_column(Text)
    output_key: Mapped[str | None] = mapped_column(String(512))
    output_text: Mapped[str | None] = mapped_column(Text)
    output_data: Mapped[str | None] = mapped_column(Text)
    duration_ms: Mapped[int | None] = mapped_column(Integer)
    unit: Mapped[str] = mapped_column(String(16))
    unit_price: Mapped[Decimal] = mapped_column(Money)
    currency: Mapped[str] = mapped_column(String(3))
    expected_quantity: Mapped[int] = mapped_column(BigInteger)
    reserved: Mapped[Decimal | None] = mapped_column(Money)
    planned_key: Mapped[str | None] = mapped_column(String(512))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[str | None] = mapped_column(String(32))
    error_message: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    sent_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    erased_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Bill(Table):
    """What a record cost: one immutable line, at most one for each record, so that settling twice is harmless."""

    __tablename__ = "bills"
    __table_args__ = (Index("ix_bills_user_id_created_at", "user_id", "created_at"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    record_id: Mapped[int] = mapped_column(ForeignKey("records.id", ondelete="RESTRICT"), unique=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    model: Mapped[str] = mapped_column(String(64))
    unit: Mapped[str] = mapped_column(String(16))
    quantity: Mapped[int] = mapped_column(BigInteger)
    unit_price: Mapped[Decimal] = mapped_column(Money)
    amount: Mapped[Decimal] = mapped_column(Money)
    currency: Mapped[str] = mapped_column(String(3))
    estimated: Mapped[bool] = mapped_column(Boolean, default=False)
    provider_request_id: Mapped[str | None] = mapped_column(String(PROVIDER_ID_CHARS))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Subtotal(Table):
    """What was billed before a moment for the calls that a user began in a month: no other bill will be.

    It is the sum of bills that nobody has to add up again, once there are many. Those since then come on top.
    """

    __tablename__ = "subtotals"

    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    month_began: Mapped[datetime] = mapped_column(UtcDateTime)
    billed_before: Mapped[datetime] = mapped_column(UtcDateTime)
    amount: Mapped[Decimal] = mapped_column(Money)


class Watched:
    """What is looked after at the provider, by any process: the columns that arrange who asks, and when.

    It was last asked at `checked_at`. `next_check_at` is when somebody has to ask again, and nothing once all is known.
    Who asks holds the claim, until it runs out. `misses` counts the checks in a row that brought nothing.
    """

    record_id: Mapped[int] = mapped_column(ForeignKey("records.id", ondelete="RESTRICT"), primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    misses: Mapped[int] = mapped_column(Integer, default=0)
    checked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    next_check_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    claimed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @property
    def provider_name(self) -> str | None:
        """What the provider calls it, for the bill."""
        return None


class Transcription(Watched, Table):
    """A task at the provider, looked after until its record has an end; then the transcripts are kept here.

    `status` and the times are what the provider said last. `unknowns` counts the checks that knew of no such task,
    `unfits` the results that were none; `key_fingerprint` names the key that it was submitted with. The transcripts are
    JSON, large for long audio, and loaded by name only.
    """

    __tablename__ = "transcriptions"
    __table_args__ = (
        Index("ix_transcriptions_user_id_task_id", "user_id", "task_id"),
        Index("ix_transcriptions_task_id", "task_id"),
        Index("ix_transcriptions_next_check_at", "next_check_at"),
    )

    task_id: Mapped[str] = mapped_column(String(PROVIDER_ID_CHARS))
    key_fingerprint: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    submitted_at: Mapped[datetime] = mapped_column(UtcDateTime)
    scheduled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    result_url: Mapped[str | None] = mapped_column(Text)
    transcripts: Mapped[str | None] = mapped_column(Text, deferred=True)
    transcripts_with_words: Mapped[str | None] = mapped_column(Text, deferred=True)
    audio_info: Mapped[str | None] = mapped_column(Text)
    unknowns: Mapped[int] = mapped_column(Integer, default=0)
    unfits: Mapped[int] = mapped_column(Integer, default=0)

    @property
    def provider_name(self) -> str | None:
        """The task's id."""
        return self.task_id


class SubmittedFile(Watched, Table):
    """A file that the provider is asked to transcribe: from before it is asked until it is known what became of that.

    Then a `Transcription` takes this row's place, or nothing does. Should the answer be lost, the task is looked for in
    the provider's list, and told by its file: `file_url` is how we named it. `key_fingerprint` names the key.
    """

    __tablename__ = "submitted_files"
    __table_args__ = (Index("ix_submitted_files_next_check_at", "next_check_at"),)

    key_fingerprint: Mapped[str] = mapped_column(String(64))
    file_url: Mapped[str] = mapped_column(Text)


class LongText(Watched, Table):
    """A text that is spoken segment by segment, until its record has an end and nothing of the work lies about.

    `characters` is what it was counted so far, every try of every segment included, `guessed` the part of them that is
    an estimate: of tries whose process died. The joined audio goes to `output_key`, subtitles to `subtitle_key`.
    """

    __tablename__ = "long_texts"
    __table_args__ = (Index("ix_long_texts_next_check_at", "next_check_at"),)

    segments_total: Mapped[int] = mapped_column(Integer)
    segments_done: Mapped[int] = mapped_column(Integer, default=0)
    characters: Mapped[int] = mapped_column(BigInteger, default=0)
    guessed: Mapped[int] = mapped_column(BigInteger, default=0)
    output_key: Mapped[str] = mapped_column(String(512))
    subtitle_key: Mapped[str | None] = mapped_column(String(512))
    cancelled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Segment(Table):
    """A part of a long text, and the checkpoint of its speech: raw samples in our store, until the whole is joined.

    While it is being bought, `attempt` names the try, and `at_stake` is what that will count in all. Once it is spoken,
    `key` is where its `samples` are, and `cues` (JSON) are its subtitles.
    """

    __tablename__ = "segments"

    record_id: Mapped[int] = mapped_column(ForeignKey("records.id", ondelete="RESTRICT"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(Text, deferred=True)
    attempt: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at_stake: Mapped[int] = mapped_column(Integer, default=0)
    key: Mapped[str | None] = mapped_column(String(512))
    samples: Mapped[int | None] = mapped_column(BigInteger)
    cues: Mapped[str | None] = mapped_column(Text, deferred=True)
