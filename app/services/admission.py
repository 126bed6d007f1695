"""What is known to be wrong with a synthesis before the provider is asked, and so before anything is paid."""

import json
import uuid
from dataclasses import replace

from app.catalog import (
    SystemVoice,
    count_characters,
    find_speech_model,
    find_voice,
    looks_cloned,
    was_cloned_for,
)
from app.dashscope import Credential, SpeechParameters
from app.errors import InvalidModel, InvalidRequest, InvalidVoice, ModelVoiceMismatch, TextTooLong
from app.models import ApiKey
from app.services.accounts import AccountService
from app.services.voices import VoiceService
from app.storage import Storage

MAX_INSTRUCTION_CHARACTERS = 100  # Han counts 2 (PROTOCOL §1.9)

SSML_ROOT = "<speak"


class SpeechAdmission:
    """Lets syntheses pass that the provider would not refuse, with the key that pays them."""

    def __init__(self, accounts: AccountService, voices: VoiceService, storage: Storage) -> None:
        self._accounts = accounts
        self._voices = voices
        self._storage = storage

    async def admit(self, user_id: uuid.UUID, parameters: SpeechParameters, stored: ApiKey | None = None) -> Credential:
        """Check model, voice and instruction, and open the user's key; `stored` is its row, if that was just read.

        Raises the AppError of what is wrong: StorageFull when what would be spoken now could not be kept.
        """
        _check(parameters)
        self._storage.require_room()
        credential = await self._accounts.credential(user_id, stored)
        if find_voice(parameters.voice) is None:
            await self._voices.require_ready(credential, parameters.voice, parameters.model)
        else:
            _require_region(parameters, credential.region)
        return credential

    async def admit_text(
        self,
        user_id: uuid.UUID,
        parameters: SpeechParameters,
        text: str,
        max_chars: int,
        stored: ApiKey | None = None,
    ) -> tuple[SpeechParameters, Credential]:
        """Check a whole text as well; SSML is recognised by its root element. Raises the AppError of what is wrong."""
        _check(parameters)
        parameters = _read_text(parameters, text, max_chars)
        return parameters, await self.admit(user_id, parameters, stored)

    async def assess_text(
        self, user_id: uuid.UUID, parameters: SpeechParameters, text: str, max_chars: int
    ) -> SpeechParameters:
        """Check as much as can be known without a key and the provider; no voice is needed, so that it may be empty.

        Raises the AppError of what is wrong.
        """
        _check(parameters, needs_voice=False)
        if find_voice(parameters.voice) is not None:
            _require_region(parameters, await self._accounts.region(user_id))
        return _read_text(parameters, text, max_chars)


def describe(parameters: SpeechParameters, text: str) -> str:
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


def read_description(model: str, asked: str) -> SpeechParameters:
    """The parameters that were described in a record."""
    said = json.loads(asked)
    return SpeechParameters(
        model=model,
        voice=said["voice"],
        format=said["format"],
        sample_rate=said["sample_rate"],
        volume=said["volume"],
        rate=said["speech_rate"],
        pitch=said["pitch_rate"],
        instruction=said.get("instruction"),
        enable_ssml=said["text"].lstrip().startswith(SSML_ROOT),
    )


def _check(parameters: SpeechParameters, *, needs_voice: bool = True) -> None:
    model = find_speech_model(parameters.model)
    if model is None:
        raise InvalidModel(f"无效的模型名称：{parameters.model[:64]}，可用模型见 /api/audio/tts/models")
    has_voice = needs_voice or parameters.voice
    voice = _find_paired_voice(parameters.voice, parameters.model) if has_voice else None
    if parameters.instruction:
        _check_instruction(parameters.instruction, takes=model.takes_instruction, voice=voice)


def _read_text(parameters: SpeechParameters, text: str, max_chars: int) -> SpeechParameters:
    """The parameters that a text is spoken with. Raises the AppError of what is wrong with it."""
    if not text.strip():
        raise InvalidRequest("text 不能为空")
    if len(text) > max_chars:
        raise TextTooLong(f"text 有 {len(text)} 个字符，单次合成不能超过 {max_chars} 个字符")
    return replace(parameters, enable_ssml=_is_ssml(parameters, text))


def _is_ssml(parameters: SpeechParameters, text: str) -> bool:
    spoken = text.strip()
    ssml = spoken.startswith(SSML_ROOT)
    if ssml and not spoken.endswith("</speak>"):
        raise InvalidRequest("text 以 <speak> 开头时按 SSML 处理，必须以 </speak> 结尾")
    voice = find_voice(parameters.voice)
    if ssml and voice is not None and not voice.features.ssml:
        raise InvalidVoice(f"音色 {voice.voice_id} 不支持 SSML，请换一个支持 SSML 的音色或使用纯文本")
    return ssml


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
