"""Where speech goes once it is spoken: into the store, with its length."""

import uuid
from datetime import datetime

import structlog
from anyio import to_thread

from app.audio import CONTENT_TYPES, AudioFormat, correct_wav_header, measure_duration_ms
from app.errors import InvalidAudio
from app.services.calls import OpenRecord
from app.services.spool import Spool
from app.settings import Settings
from app.storage import Storage

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

    async def keep(self, record: OpenRecord, spool: Spool, audio_format: AudioFormat, sample_rate: int) -> None:
        """Store what was spoken, byte for byte but for a WAV header with unknown sizes. Raises StorageError."""
        if audio_format == "wav":
            await to_thread.run_sync(correct_wav_header, spool.file)
        key = self.new_key(audio_format)
        await self._storage.put(key, spool.file, content_type=CONTENT_TYPES[audio_format])
        record.output_key = key
        try:
            record.duration_ms = await to_thread.run_sync(measure_duration_ms, spool.file, audio_format, sample_rate)
        except InvalidAudio:
            log.warning("provider_audio_undecodable", record_id=record.id, bytes=spool.size)
