"""What a provider error means to our client, and whether asking again is harmless (DESIGN §5, PROTOCOL §11)."""

import math
import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from app.errors import (
    AppError,
    AudioTooLong,
    ConnectionLost,
    HandshakeTimeout,
    InvalidApiKey,
    InvalidAudio,
    InvalidModel,
    InvalidVoice,
    Throttled,
    UnclearAnswer,
    Unreachable,
    UpstreamError,
    UpstreamNotFound,
    UpstreamTimeout,
    VoiceLimitExceeded,
    VoiceNotFound,
)
from app.transcripts import storable

THROTTLE_RETRY_AFTER_SECONDS = 5  # told to our client where the provider names no time
MAX_RETRY_AFTER_SECONDS = 3600
RETRY_BASE_SECONDS = 0.5
MAX_PROVIDER_MESSAGE_CHARS = 200
MAX_READ_CHARS = 4000  # of a message: searching takes longer than linear time

_INVALID_MODEL = {"ModelNotFound", "model_not_found", "Model.AccessDenied", "AccessDenied.Unpurchased"}
_VOICE_GONE = {"BadRequest.ResourceNotExist", "BadRequest.VoiceNotFound", "VoiceNotFound"}
_TOO_LONG = ("AudioLengthError", "AUDIO_DURATION_TOO_LONG", "DurationLimitError")
_BAD_AUDIO = ("UnsupportedFileFormat", "DownloadFailed", "FILE_", "DECODE_ERROR")
_AUDIO_REASONS = {
    "FILE_DOWNLOAD_FAILED": "音频文件无法下载，请确认 URL 可公网访问",
    "InvalidFile.DownloadFailed": "音频文件无法下载，请确认 URL 可公网访问",
    "BadRequest.InputDownloadFailed": "音频文件无法下载，请确认 URL 可公网访问",
    "FILE_404_NOT_FOUND": "音频文件不存在（HTTP 404），请检查 URL",
    "FILE_403_FORBIDDEN": "没有权限下载音频文件（HTTP 403），请检查 URL 的访问权限或签名是否过期",
    "REQUEST_INVALID_FILE_URL_VALUE": "音频文件的 URL 无效",
    "CONTENT_LENGTH_CHECK_FAILED": "音频文件的长度与服务器声明的不一致，请检查文件服务器",
    "FILE_SERVER_ERROR": "音频文件所在的服务器出错，请稍后重试",
    "FILE_TOO_LARGE": "音频文件过大（最大 2 GB），请压缩或拆分后重试",
    "FILE_CHECK_FAILED": "音频文件未通过检查，请确认格式正确",
    "FILE_NORMALIZE_FAILED": "音频文件无法转码，请确认文件没有损坏",
    "FILE_PARSE_FAILED": "音频文件无法解析，请确认格式正确",
    "MKV_PARSE_FAILED": "MKV 文件无法解析，请转换为其他格式",
    "DECODE_ERROR": "音频文件无法解码，请确认文件没有损坏",
    "BadRequest.UnsupportedFileFormat": "音频格式不受支持",
    "Audio.AudioShortError": "音频中的有效语音太短，至少需要 5 秒连续清晰的朗读",
    "Audio.AudioSilentError": "音频中没有声音，请重新录制",
    "Audio.DecoderError": "音频文件无法解码，请确认文件没有损坏",
    "Audio.FileSizeExceed": "音频文件过大",
    "Audio.AudioRateError": "音频采样率过低，声音复刻要求不低于 16 kHz",
    "Audio.PreprocessError": "录音无法处理，请使用清晰、无背景音的人声重新录制",
}
_THROTTLED = {"limit_requests", "limit_burst_rate", "insufficient_quota"}

# The provider tells these apart only by their words.
_BAD_VOICE_WORDS = ("Engine return error code: 418", "voice is invalid", "Remote cancelled grpc stream")
_BAD_MODEL_WORDS = ("Model not exist", "Model can not be found")
_VOICE_QUOTA_WORDS = ("您当前的配额为", "voice storage limit", "voice limit")
_BAD_FORMAT_WORDS = ("unsupported audio format",)
_BAD_RECORDING_WORDS = ("audio preprocess server error", "request asr failed")
_FREE_QUOTA_WORDS = ("Free allocated quota exceeded",)
_THROTTLED_WORDS = ("rate limit exceeded", "exceeded your request limit")
_TIMED_OUT = {"RequestTimeOut", "ResponseTimeout"}

_REASONS = {
    "Arrearage": "百炼账号已欠费，请充值后重试",
    "AllocationQuota.FreeTierOnly": "免费额度已用完，请在百炼控制台关闭“仅使用免费额度”",
    "PrepaidBillOverdue": "百炼账号的预付费账单已逾期",
    "PostpaidBillOverdue": "百炼账号的后付费账单已逾期",
    "CommodityNotPurchased": "百炼账号尚未开通该服务",
    "DataInspectionFailed": "内容可能不合规，请修改后重试",
    "data_inspection_failed": "内容可能不合规，请修改后重试",
    "Throttling.AllocationQuota": "百炼账号的免费额度已用完",
    "insufficient_quota": "百炼账号的免费额度已用完",
    "InternalError": "百炼平台内部错误，请稍后重试",
    "SystemError": "百炼平台内部错误，请稍后重试",
    "ModelServingError": "百炼平台繁忙，请稍后重试",
    "ModelUnavailable": "模型暂时不可用，请稍后重试",
    "FILE_TRANS_TASK_EXPIRED": "任务不存在或已过期，请重新提交",
    "InternalError.Timeout": "百炼平台处理超时（3 小时），请重新提交",
    "CANCELED": "任务已被取消",
    "WorkSpaceNotFound": "业务空间不存在，请检查 workspace",
    "Workspace.AccessDenied": "没有该业务空间的权限，请检查 workspace",
}
_ITS_FAULT = {"InternalError", "SystemError", "ModelServingError", "ModelUnavailable"}
_SECRET = re.compile(r"(?<![A-Za-z0-9])(?:sk|st)-[A-Za-z0-9_.*-]+|Bearer\s+\S+", re.IGNORECASE)
_URL_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+", re.IGNORECASE)  # it may hold a signature
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


def explain(code: str, message: str, status: int = 0) -> AppError:
    """Turn the provider's error into ours, by its code, its words or at last its HTTP status."""
    code, message = plain(code), message[:MAX_READ_CHARS]
    if code in {"InvalidApiKey", "invalid_api_key"}:
        return InvalidApiKey()
    if code in _INVALID_MODEL or _says(message, _BAD_MODEL_WORDS):
        return InvalidModel(f"模型不存在，或账号未开通该模型（{code}）")
    if _says(message, _BAD_VOICE_WORDS):
        return InvalidVoice("音色不存在、未就绪，或不能与该模型一起使用，请检查 voice 与 model")
    if code in _VOICE_GONE:
        return VoiceNotFound()
    if any(part in code for part in _TOO_LONG):
        return AudioTooLong(f"音频时长超过限制，请缩短或拆分后重试（{code}）")
    if code in _AUDIO_REASONS:
        return InvalidAudio(f"{_AUDIO_REASONS[code]}（{code}）")
    if code.startswith("Audio.") or (code not in _REASONS and any(part in code for part in _BAD_AUDIO)):
        return InvalidAudio(f"音频不符合要求：{plain(message)}（{code}）")
    if _says(message, _BAD_FORMAT_WORDS):
        return InvalidAudio(f"音频格式不受支持（{code}）")
    # What limits a rate is 429; with 400 the same code is about voices (§3).
    is_voice_quota = status == 400 and code == "Throttling.AllocationQuota"
    if is_voice_quota or (code.startswith("Throttling") and _says(message, _VOICE_QUOTA_WORDS)):
        return VoiceLimitExceeded()
    if _is_throttle(code, message, status):
        return Throttled(retry_after_seconds=THROTTLE_RETRY_AFTER_SECONDS)
    reason = _REASONS.get(code) or plain(message) or "没有说明原因"
    if _says(message, _BAD_RECORDING_WORDS):
        reason = "录音无法处理，请检查录音质量或 URL"
    kind = UpstreamError
    if code in _TIMED_OUT:
        kind = UnclearAnswer
    elif status == 404 and code not in _REASONS:
        kind = UpstreamNotFound
    error = kind(f"百炼平台返回错误：{reason}（{code or '无错误码'}）")
    error.is_its_fault = status >= 500 or (not status and code in _ITS_FAULT)
    return error


def may_retry(error: AppError, *, accepted: bool) -> bool:
    """Whether the same call may be made again: only when the provider surely did not take it on."""
    return not accepted and isinstance(error, ConnectionLost | HandshakeTimeout | Throttled)


def may_pass(error: AppError) -> bool:
    """Whether the same work, asked for once more, may succeed; what was counted until then is paid all the same."""
    if isinstance(error, Throttled | ConnectionLost | UpstreamTimeout | UnclearAnswer):
        return True
    return isinstance(error, UpstreamError) and error.is_its_fault


def may_have_worked(error: AppError) -> bool:
    """Whether the provider may have done the work, or do it yet, although no answer says so."""
    if isinstance(error, Unreachable | HandshakeTimeout):
        return False
    return isinstance(error, ConnectionLost | UpstreamTimeout | UnclearAnswer)


class ToldSeconds(int):
    """Seconds that the provider itself asks us to wait, other than those that we guess."""


def heed(error: AppError, status: int, retry_after: str | None) -> AppError:
    """Let an error that may pass say when, as the provider told in `Retry-After` beside 429 or 503.

    No such header is documented (PROTOCOL §15), but a gateway may send it. What is no time is ignored.
    """
    if status in {429, 503} and may_pass(error) and (told := read_retry_after(retry_after)):
        error.retry_after_seconds = told
    return error


def read_retry_after(value: str | None) -> ToldSeconds | None:
    """Read a `Retry-After`, in seconds or as a date, within 1 to 3600 seconds; None for what is neither."""
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,15}", value):
        seconds = float(value)
    else:
        try:
            moment = parsedate_to_datetime(value)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            seconds = (moment - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return ToldSeconds(max(1, min(math.ceil(seconds), MAX_RETRY_AFTER_SECONDS)))


def backoff_seconds(attempt: int) -> float:
    """Exponential, and spread by chance, so that callers throttled together do not return together."""
    return RETRY_BASE_SECONDS * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311


def _is_throttle(code: str, message: str, status: int) -> bool:
    if _says(message, _FREE_QUOTA_WORDS):
        return False
    if code in _THROTTLED or code.startswith("Throttling"):
        return True
    # Who blames himself may talk of rates, and have worked all the same.
    return status < 500 and code not in _ITS_FAULT and _says(message, _THROTTLED_WORDS)


def _says(message: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase.casefold() in message.casefold() for phrase in phrases)


def plain(message: str) -> str:
    """The provider's own words without anything that looks like a secret, on one line, cut to a bearable length."""
    printable = _CONTROL.sub(" ", storable(message[:MAX_READ_CHARS]))
    public = _URL_QUERY.sub(r"\1", _SECRET.sub("***", printable))
    return " ".join(public.split())[:MAX_PROVIDER_MESSAGE_CHARS]
