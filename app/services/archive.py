"""Where speech goes once it is spoken: into the store, with its length."""

import uuid
from datetime import datetime

import structlog
from anyio import to_thread

from app.audio import CONTENT_TYPES, PCM_FRAME_BYTES, AudioFormat, correct_wav_header, measure_duration_ms
from app.dashscope import SpeechParameters
from app.errors import InvalidAudio, ObjectNotFound
from app.models import Record
from app.playtime import begin_playtime
from app.services.admission import read_description
from app.services.calls import OpenRecord
from app.services.spool import Spool
from app.settings import Settings
from app.storage import Storage

# More than speech usually takes: what is refused for want of room costs nothing, what has no room is lost.
SECONDS_PER_CHARACTER = 0.4
COMPRESSED_BYTES_PER_SECOND = 16_000

log = structlog.get_logger(__name__)


class SpeechArchive:
    """Keeps spoken audio as it was spoken."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings = settings
        self._storage = storage

    def new_key(self, suffix: str) -> str:
        """A key for speech of today, in the zone that clients are shown times in."""
        today = datetime.now(self._settings.zone).strftime("%Y%m%d")
        return f"audio/tts/{today}/{uuid.uuid4()}.{suffix}"

    def require_room(self, parameters: SpeechParameters, text: str) -> None:
        """Refuse speech that could not be kept, if that is known now. Raises StorageFull."""
        is_plain = parameters.format in {"wav", "pcm"}
        bytes_per_second = PCM_FRAME_BYTES * parameters.sample_rate if is_plain else COMPRESSED_BYTES_PER_SECOND
        self._storage.require_room(int(len(text) * SECONDS_PER_CHARACTER / parameters.rate * bytes_per_second))

    def new_spool(self, parameters: SpeechParameters) -> Spool:
        """Where speech is gathered until it is kept."""
        return Spool(begin_playtime(parameters.format, parameters.sample_rate))

    async def keep(self, record: OpenRecord, spool: Spool, audio_format: AudioFormat, sample_rate: int) -> None:
        """Store what was spoken, byte for byte but for a WAV header with unknown sizes. Raises StorageError."""
        if audio_format == "wav":
            await spool.look(correct_wav_header)
        key = record.planned_key or self.new_key(audio_format)
        await self._storage.keep(key, spool.file, content_type=CONTENT_TYPES[audio_format])
        record.output_key = key
        try:
            record.duration_ms = await _measure(spool, audio_format, sample_rate)
        except InvalidAudio:
            log.warning("provider_audio_undecodable", record_id=record.id, bytes=spool.size)

    async def measure_kept(self, record: Record) -> int | None:
        """The milliseconds of the audio that a process kept for a record before it died; None where there is none.

        Raises StorageError.
        """
        if record.planned_key is None:
            return None
        parameters = read_description(record.model_name, record.input_data)
        async with self.new_spool(parameters) as spool:
            try:
                async with self._storage.open(record.planned_key) as chunks:
                    async for chunk in chunks:
                        await spool.write(chunk)
                return await _measure(spool, parameters.format, parameters.sample_rate)
            except (ObjectNotFound, InvalidAudio):
                return None


async def _measure(spool: Spool, audio_format: AudioFormat, sample_rate: int) -> int:
    """The milliseconds that were counted on the way, or else that the file tells. Raises InvalidAudio."""
    if spool.playtime is not None and (counted := spool.playtime.duration_ms) is not None:
        return counted
    if audio_format == "wav":
        return await spool.look(lambda file: measure_duration_ms(file, audio_format, sample_rate))
    return await to_thread.run_sync(measure_duration_ms, spool.file, audio_format, sample_rate)
