"""What a client asks for does not fit, does not exist, or is no longer wanted."""

from app.errors.root import AppError


class InvalidRequest(AppError):
    """A field is missing, of the wrong type or out of its bounds."""

    status = 400
    code = "INVALID_REQUEST"
    default_message = "请求参数错误"


class InvalidModel(AppError):
    """The model does not exist, or the user's account may not use it."""

    status = 400
    code = "INVALID_MODEL"
    default_message = "无效的模型名称"


class InvalidVoice(AppError):
    """The voice does not exist or cannot be used."""

    status = 400
    code = "INVALID_VOICE"
    default_message = "无效的音色ID或音色不可用"


class ModelVoiceMismatch(AppError):
    """The voice exists, but speaks with another model."""

    status = 400
    code = "MODEL_VOICE_MISMATCH"
    default_message = "模型与音色不匹配"


class InvalidAudio(AppError):
    """Not audio, an unsupported container, or a quality that the provider refuses."""

    status = 400
    code = "INVALID_AUDIO"
    default_message = "音频格式不支持或质量不符合要求"


class AudioTooLarge(InvalidAudio):
    """The audio has more bytes than the route or the provider takes."""

    default_message = "音频文件过大"


class AudioTooLong(AppError):
    """The audio is longer than the route or the provider takes."""

    status = 400
    code = "AUDIO_TOO_LONG"
    default_message = "音频时长超过限制"


class TextTooLong(AppError):
    """The text is longer than one synthesis takes."""

    status = 400
    code = "TEXT_TOO_LONG"
    default_message = "文本长度超过限制"


class VoiceLimitExceeded(AppError):
    """The account holds as many cloned voices as the provider allows."""

    status = 400
    code = "VOICE_LIMIT_EXCEEDED"
    default_message = "音色数量达到上限（1000个/账号），请先删除不用的音色"


class VoiceNotFound(AppError):
    """The account has no such cloned voice."""

    status = 404
    code = "VOICE_NOT_FOUND"
    default_message = "音色不存在"


class TaskNotFound(AppError):
    """The user has no such transcription task."""

    status = 404
    code = "TASK_NOT_FOUND"
    default_message = "任务不存在"


class RecordNotFound(AppError):
    """The user has no such record."""

    status = 404
    code = "NOT_FOUND"
    default_message = "记录不存在"


class ObjectNotFound(AppError):
    """The store holds nothing under this key."""

    status = 404
    code = "NOT_FOUND"
    default_message = "文件不存在"


class IdempotencyConflict(AppError):
    """The client used one Idempotency-Key for two different requests."""

    status = 409
    code = "IDEMPOTENCY_CONFLICT"
    default_message = "该 Idempotency-Key 已用于另一个请求，请为不同的请求使用不同的值"


class AskedBefore(IdempotencyConflict):
    """The same request is under way already, or done."""

    default_message = "相同 Idempotency-Key 的请求正在处理，请稍后重试"


class NoTranscript(AppError):
    """The transcription has no transcript to make subtitles of, not yet or not at all."""

    status = 409
    code = "NO_TRANSCRIPT"
    default_message = "任务尚未完成，请稍后再试"


class NotCancellable(AppError):
    """The call is under way, and of a kind that cannot be stopped."""

    status = 409
    code = "NOT_CANCELLABLE"
    default_message = "该任务正在进行，不支持取消"


class Cancelled(AppError):
    """The user stopped the work while it was waited for."""

    status = 409
    code = "CANCELLED"
    default_message = "合成已取消，已合成的部分见历史记录"


class IdleTimeout(AppError):
    """Nothing came from the client of a live session for too long."""

    status = 408
    code = "IDLE_TIMEOUT"
    default_message = "长时间没有收到消息，连接已关闭"


class RequestTimeout(AppError):
    """The rest of a request did not come in time."""

    status = 408
    code = "REQUEST_TIMEOUT"
    default_message = "请求没有及时发送完，请检查网络后重试"


class HeadTooLarge(AppError):
    """More headers, or a longer request line, than anybody needs."""

    status = 431
    code = "HEAD_TOO_LARGE"
    default_message = "请求头过大或过多，请缩短地址、减少请求头后重试"


class PayloadTooLarge(AppError):
    """The body is larger than any request of the API."""

    status = 413
    code = "PAYLOAD_TOO_LARGE"
    default_message = "请求体过大"


class Abandoned(AppError):
    """The client hung up before the provider was given any work."""

    status = 499
    code = "ABANDONED"
    default_message = "客户端已断开，未产生费用"
