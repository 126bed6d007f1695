"""Every table. Money is exact, time is UTC, and a bill line is never changed once it is written."""

import uuid
from datetime import datetime
from decimal import Decimal

from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.columns import BUDGET_DECIMALS, Money, UtcDateTime

PROVIDER_ID_CHARS = 128
_UNERASED = text("erased_at IS NULL")


class Table(DeclarativeBase):
    """The declarative root; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class User(Table):
    """Somebody who may log in. `username_key` is the name as it is compared: normalised and case-folded.

    Calls that would bring a month's cost above `monthly_budget`, if there is one, are refused.
    """

    __tablename__ = "users"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    username: Mapped[str] = mapped_column(String(64))
    username_key: Mapped[str] = mapped_column(Text, unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    monthly_budget: Mapped[Decimal | None] = mapped_column(Money(BUDGET_DECIMALS))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ApiKey(Table):
    """A user's DashScope key, sealed: `masked` is all of it that can ever be shown."""

    __tablename__ = "api_keys"

    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    masked: Mapped[str] = mapped_column(String(32))
    region: Mapped[str] = mapped_column(String(16))
    workspace: Mapped[str | None] = mapped_column(String(64))
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


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
        Index("ix_records_user_id_id", "user_id", "id"),
        Index("ix_records_user_id_type_id", "user_id", "type", "id"),
        Index("ix_records_user_id_model_name_id", "user_id", "model_name", "id"),
        Index("ix_records_user_id_created_at", "user_id", "created_at"),
        Index("ix_records_status_lease_expires_at", "status", "lease_expires_at"),
        Index("uq_records_user_id_idempotency_key", "user_id", "idempotency_key", unique=True),
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


class Enrollment(Watched, Table):
    """The making of a voice: from before the provider is asked until the voice is ready or rejected.

    Until its answer is here, `voice_id` is empty, and `voices_before` (JSON) are the voices of that prefix that there
    were when it was asked, null if they could not be listed, so that the new one is told from them should the answer be
    lost: `lost_at`. `digest` names the same order of the same sample. Then `status` follows the voice, since
    `followed_since`.
    """

    __tablename__ = "enrollments"
    __table_args__ = (
        Index("ix_enrollments_next_check_at", "next_check_at"),
        Index("ix_enrollments_account_target_model_prefix", "account", "target_model", "prefix"),
        UniqueConstraint("voice_id", "account"),
    )

    account: Mapped[str] = mapped_column(String(64))
    target_model: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    voices_before: Mapped[str] = mapped_column(Text)
    lost_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    voice_id: Mapped[str | None] = mapped_column(String(PROVIDER_ID_CHARS))
    status: Mapped[str | None] = mapped_column(String(16))
    followed_since: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Voice(Table):
    """A cloned voice of an account at the provider, as it was last seen there: at `seen_at`, by whatever call.

    One that we deleted stays as `deleted_at` for a while, because the provider's list may still name it.
    """

    __tablename__ = "voices"
    __table_args__ = (Index("ix_voices_voice_id", "voice_id"),)

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    voice_id: Mapped[str] = mapped_column(String(PROVIDER_ID_CHARS), primary_key=True)
    target_model: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    modified_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class VoiceListing(Table):
    """When an account's voices were last listed at the provider, and who lists them now."""

    __tablename__ = "voice_listings"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    listed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    claimed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class VoiceSample(Table):
    """A recorded voice in our store, which only the provider may hear. It is removed once `remove_at` has passed.

    Until its voice is known to exist, that is soon: what a crash leaves behind goes away by itself. `record_id` is that
    of the voice's making; samples that it was updated with have none.
    """

    __tablename__ = "voice_samples"
    __table_args__ = (
        Index("ix_voice_samples_voice_id", "voice_id"),
        Index("ix_voice_samples_remove_at", "remove_at"),
    )

    key: Mapped[str] = mapped_column(String(512), primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    record_id: Mapped[int | None] = mapped_column(ForeignKey("records.id", ondelete="RESTRICT"), unique=True)
    account: Mapped[str] = mapped_column(String(64))
    voice_id: Mapped[str | None] = mapped_column(String(PROVIDER_ID_CHARS))
    remove_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


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


class Removal(Table):
    """An object that is to disappear from the store, written down when the database forgets where it was.

    It is removed once `remove_at` has passed, and again a day after it was `removed_at` for the first time. Whoever
    works on it puts `remove_at` off and is named by `claimed_by`. `erasure_id` names an erasure, and no user.
    """

    __tablename__ = "removals"
    __table_args__ = (
        Index("ix_removals_remove_at", "remove_at"),
        Index("ix_removals_erasure_id_remove_at", "erasure_id", "remove_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    key: Mapped[str] = mapped_column(String(512))
    remove_at: Mapped[datetime] = mapped_column(UtcDateTime)
    removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    misses: Mapped[int] = mapped_column(Integer, default=0)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    erasure_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)


class Erasure(Table):
    """A user who is to vanish, from when he may come in no more until nothing is left of him, this row included.

    `accounts` (JSON) are those that his keys reached at the provider. Somebody goes on with it once `next_at` has
    passed, and puts that off; `claimed_by` names who did so last.
    """

    __tablename__ = "erasures"
    __table_args__ = (Index("ix_erasures_next_at", "next_at"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"), unique=True)
    accounts: Mapped[str] = mapped_column(Text)
    next_at: Mapped[datetime] = mapped_column(UtcDateTime)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)


class GeneratedSecret(Table):
    """Tells machines that made a secret themselves whether they have the same one: by a fingerprint of it."""

    __tablename__ = "generated_secrets"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
