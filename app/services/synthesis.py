"""Text to speech: check, open the record, let the provider speak, keep the audio, settle."""

import asyncio
import json
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import partial

import structlog
from anyio import to_thread

from app.audio import CONTENT_TYPES, correct_wav_header, measure_duration_ms
from app.catalog import (
    PriceList,
    SystemVoice,
    count_characters,
    find_speech_model,
    find_voice,
    looks_cloned,
    was_cloned_for,
)
from app.dashscope import Credential, Interruption, SpeechClient, SpeechParameters, Usage
from app.errors import (
    AppError,
    InvalidAudio,
    InvalidModel,
    InvalidRequest,
    InvalidVoice,
    ModelVoiceMismatch,
    NotReady,
    TextTooLong,
    UpstreamError,
)
from app.services.accounts import AccountService
from app.services.inflight import InFlight
from app.services.listening import Audience, Listener
from app.services.records import OpenRecord, Price, RecordService
from app.services.spool import Spool
from app.services.voices import VoiceService
from app.settings import Settings
from app.storage import Storage

log = structlog.get_logger(__name__)

MAX_TEXT_CHARS = 2000
MAX_INSTRUCTION_CHARACTERS = 100  # Han counts 2 (PROTOCOL §1.9)
# A streamed answer ends when its record is settled, so that a client finds it in the history at once; a slow store
# holds the end back no longer than this.
KEEPING_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SpokenAudio:
    """A finished synthesis: where the audio is, how long it plays, what it cost."""

    record_id: int
    url: str
    duration_ms: int
    characters: int
    amount: Decimal


class SynthesisService:
    """Turns text into stored audio, whole or while it is spoken."""

    def __init__(
        self,
        settings: Settings,
        prices: PriceList,
        accounts: AccountService,
        records: RecordService,
        speech: SpeechClient,
        voices: VoiceService,
        storage: Storage,
        in_flight: InFlight,
    ) -> None:
        self._settings = settings
        self._prices = prices
        self._accounts = accounts
        self._records = records
        self._speech = speech
        self._voices = voices
        self._storage = storage
        self._in_flight = in_flight

    async def synthesize(self, user_id: uuid.UUID, parameters: SpeechParameters, text: str) -> SpokenAudio:
        """Speak a text and keep the audio. Goes on to its end even if the caller does not wait for it.

        Raises the AppError that tells the client what went wrong.
        """
        parameters, credential = await self._admit(user_id, parameters, text)
        work = self._perform(user_id, credential, parameters, text, Audience())
        record = await asyncio.shield(self._in_flight.start(work))
        if record.output_key is None or record.duration_ms is None:
            raise NotReady("服务正在重启，合成已中止，已合成的部分见历史记录")
        url = self._storage.url(record.output_key)
        return SpokenAudio(record.id, url, record.duration_ms, record.quantity, record.amount)

    async def stream(self, user_id: uuid.UUID, parameters: SpeechParameters, text: str) -> Listener:
        """Speak a text to a listener; the same audio is kept. The record is settled also when the listener leaves.

        Raises what is known to be wrong before the provider is asked; later failures reach the listener.
        """
        parameters, credential = await self._admit(user_id, parameters, text)
        listener = Listener()
        self._in_flight.start(self._perform(user_id, credential, parameters, text, listener))
        return listener

    async def _admit(
        self, user_id: uuid.UUID, parameters: SpeechParameters, text: str
    ) -> tuple[SpeechParameters, Credential]:
        """Refuse what is known to be wrong before the provider is asked, and open the user's key."""
        parameters = _checked(parameters, text)
        credential = await self._accounts.credential(user_id)
        if find_voice(parameters.voice) is None:
            await self._voices.require_ready(credential, parameters.voice, parameters.model)
        else:
            _require_region(parameters, credential.region)
        return parameters, credential

    async def _perform(
        self, user_id: uuid.UUID, credential: Credential, parameters: SpeechParameters, text: str, audience: Audience
    ) -> OpenRecord:
        """Speak, keep and settle. Gives the record as it was settled, or raises what it failed with."""
        price = Price("character", self._prices.per_character(parameters.model), self._prices.currency)
        asked = _describe(parameters, text)
        try:
            async with (
                self._records.running(user_id, "tts", parameters.model, asked, price) as record,
                Spool() as spool,
            ):
                audience.welcome(record.id)
                failure = await self._speak(record, credential, parameters, text, spool, audience)
                audience.end_within(KEEPING_SECONDS, failure)
                if spool.size:
                    await self._keep(record, spool, parameters)
                if failure is not None:
                    raise failure
                if record.duration_ms is None and record.cut_off is None:
                    raise UpstreamError("百炼平台没有返回可播放的音频，请稍后重试")
        except BaseException as error:
            audience.end(error if isinstance(error, AppError) else AppError())
            raise
        audience.end()
        return record

    async def _speak(
        self,
        record: OpenRecord,
        credential: Credential,
        parameters: SpeechParameters,
        text: str,
        spool: Spool,
        audience: Audience,
    ) -> AppError | None:
        """Bring the audio into the spool and to the audience. Gives what cut it off; the count is in the record."""
        usage, interruption = Usage(), Interruption()
        audience.on_leave(interruption.request)
        foresee = partial(self._records.foresee, record, count_characters(text, ssml=parameters.enable_ssml))
        try:
            with self._in_flight.stoppable(interruption.request):
                async with self._speech.speak(credential, parameters, text, usage, foresee, interruption) as task:
                    async for chunk in task.audio():
                        await spool.write(chunk)
                        await audience.hear(chunk)
        except AppError as error:
            return error
        finally:
            record.quantity, record.provider_request_id = usage.characters, usage.request_id
            if audience.dismissed or self._in_flight.stopping:
                record.cut_off = "interrupted"
            elif audience.left:
                record.cut_off = "abandoned"
        return None

    async def _keep(self, record: OpenRecord, spool: Spool, parameters: SpeechParameters) -> None:
        """Store what was spoken, byte for byte but for a WAV header with unknown sizes. Raises StorageError."""
        audio_format = parameters.format
        if audio_format == "wav":
            await to_thread.run_sync(correct_wav_header, spool.file)
        today = datetime.now(self._settings.zone).strftime("%Y%m%d")
        key = f"audio/tts/{today}/{uuid.uuid4()}.{audio_format}"
        await self._storage.put(key, spool.file, content_type=CONTENT_TYPES[audio_format])
        record.output_key = key
        try:
            record.duration_ms = await to_thread.run_sync(
                measure_duration_ms, spool.file, audio_format, parameters.sample_rate
            )
        except InvalidAudio:
            log.warning("provider_audio_undecodable", record_id=record.id, bytes=spool.size)


def _checked(parameters: SpeechParameters, text: str) -> SpeechParameters:
    """Refuse what the provider would refuse, before money is spent; recognise SSML by its root element."""
    model = find_speech_model(parameters.model)
    if model is None:
        raise InvalidModel(f"无效的模型名称：{parameters.model[:64]}，可用模型见 /api/audio/tts/models")
    if not text.strip():
        raise InvalidRequest("text 不能为空")
    if len(text) > MAX_TEXT_CHARS:
        raise TextTooLong(f"text 有 {len(text)} 个字符，单次合成不能超过 {MAX_TEXT_CHARS} 个字符")
    voice = _find_paired_voice(parameters.voice, parameters.model)
    if parameters.instruction:
        _check_instruction(parameters.instruction, takes=model.takes_instruction, voice=voice)
    spoken = text.strip()
    ssml = spoken.startswith("<speak")
    if ssml and not spoken.endswith("</speak>"):
        raise InvalidRequest("text 以 <speak> 开头时按 SSML 处理，必须以 </speak> 结尾")
    if ssml and voice is not None and not voice.features.ssml:
        raise InvalidVoice(f"音色 {voice.voice_id} 不支持 SSML，请换一个支持 SSML 的音色或使用纯文本")
    return replace(parameters, enable_ssml=ssml)


def _find_paired_voice(voice_id: str, model_id: str) -> SystemVoice | None:
    """The system voice of this id; None for one that looks cloned, which only the provider knows.

    Raises InvalidVoice or ModelVoiceMismatch.
    """
    voice = find_voice(voice_id)
    if voice is not None:
        if model_id not in voice.models:
            raise ModelVoiceMismatch(f"音色 {voice_id} 不能与 {model_id} 一起使用，它支持：{'、'.join(voice.models)}")
        return voice
    if not looks_cloned(voice_id):
        raise InvalidVoice("音色不存在，请使用系统音色列表中的 voice_id 或复刻音色ID")
    if not was_cloned_for(voice_id, model_id):
        raise ModelVoiceMismatch("复刻音色只能与创建时的 target_model 一起使用，请修改 model")
    return None


def _require_region(parameters: SpeechParameters, region: str) -> None:
    """Refuse a system voice that the key's region does not have (PROTOCOL §1.9)."""
    here = find_voice(parameters.voice, region)
    if here is None:
        raise InvalidVoice(f"音色 {parameters.voice} 在 API Key 所在地域不可用，可用音色见 /api/audio/voice/system")
    if parameters.model not in here.models:
        raise ModelVoiceMismatch(
            f"音色 {parameters.voice} 在 API Key 所在地域不能与 {parameters.model} 一起使用，"
            f"它支持：{'、'.join(here.models)}"
        )


def _check_instruction(instruction: str, *, takes: bool, voice: SystemVoice | None) -> None:
    if not takes or (voice is not None and not voice.features.instruct):
        raise InvalidRequest("该模型或音色不支持 instruction，请去掉该参数或换一个支持 Instruct 的音色")
    if count_characters(instruction) > MAX_INSTRUCTION_CHARACTERS:
        raise InvalidRequest(f"instruction 不能超过 {MAX_INSTRUCTION_CHARACTERS} 个字符（一个汉字算 2 个）")


def _describe(parameters: SpeechParameters, text: str) -> str:
    """What was asked, as the history shows it."""
    asked: dict[str, object] = {
        "text": text,
        "voice": parameters.voice,
        "format": parameters.format,
        "sample_rate": parameters.sample_rate,
        "volume": parameters.volume,
        "speech_rate": parameters.rate,
        "pitch_rate": parameters.pitch,
    }
    if parameters.instruction:
        asked["instruction"] = parameters.instruction
    return json.dumps(asked, ensure_ascii=False)
