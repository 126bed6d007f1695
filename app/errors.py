"""Everything that a client can be told went wrong: one class per event.

AppError
├── InvalidRequest          400 INVALID_REQUEST
├── InvalidModel            400 INVALID_MODEL
├── InvalidVoice            400 INVALID_VOICE
├── ModelVoiceMismatch      400 MODEL_VOICE_MISMATCH
├── InvalidAudio            400 INVALID_AUDIO
│   └── AudioTooLarge           more bytes than are taken
├── AudioTooLong            400 AUDIO_TOO_LONG
├── TextTooLong             400 TEXT_TOO_LONG
├── VoiceLimitExceeded      400 VOICE_LIMIT_EXCEEDED
├── Unauthorized            401 UNAUTHORIZED
│   ├── InvalidCredentials      wrong name or password
│   └── InvalidApiKey           the provider refuses the user's key
├── NoApiKey                403 NO_API_KEY
├── RegistrationClosed      403 REGISTRATION_CLOSED
├── BudgetExceeded          403 BUDGET_EXCEEDED: the call would exceed what the user allows himself a month
├── VoiceNotFound           404 VOICE_NOT_FOUND
├── TaskNotFound            404 TASK_NOT_FOUND
├── RecordNotFound          404 NOT_FOUND
├── ObjectNotFound          404 NOT_FOUND
├── UsernameTaken           409 USERNAME_TAKEN
├── IdempotencyConflict     409 IDEMPOTENCY_CONFLICT: the key names another request
├── AskedBefore             409 IDEMPOTENCY_CONFLICT: the same request was quicker; its answer is waited for
├── NoTranscript            409 NO_TRANSCRIPT: the task is not finished, or has failed
├── NotCancellable          409 NOT_CANCELLABLE: a call under way that cannot be stopped
├── Cancelled               409 CANCELLED: the user stopped it while somebody waited for it
├── PayloadTooLarge         413 PAYLOAD_TOO_LARGE: a body that is refused unread
├── IdleTimeout             408 IDLE_TIMEOUT: a live session in which nothing happens
├── Abandoned               499 ABANDONED: the client left before anything was bought
├── RateLimited             429 RATE_LIMITED
│   └── Throttled               the provider's own limit
├── SealBroken              500 INTERNAL_ERROR: a stored key cannot be opened
├── UpstreamError           502 UPSTREAM_ERROR
│   ├── ConnectionLost          the connection to the provider broke
│   │   └── Unreachable             none came up; no work was accepted
│   ├── UnclearAnswer           an answer that does not tell whether the work was done
│   ├── UpstreamNotFound        the provider knows nothing of this name
│   └── StorageError            the object store refused or could not be reached
├── NotReady                503 NOT_READY: the database or the store does not answer
│   ├── StorageFull             what would be paid for now could be kept nowhere
│   └── Restarting              this process is about to end, in the middle of a live session
└── UpstreamTimeout         504 TIMEOUT
    └── HandshakeTimeout        no connection came up in time

Messages are Chinese, say what to do, and never carry a key, a token or an internal path.
"""

from typing import ClassVar


class AppError(Exception):
    """The root: an HTTP status, a stable name for programs and a message for people."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "INTERNAL_ERROR"
    default_message: ClassVar[str] = "服务器内部错误，请稍后重试"

    def __init__(self, message: str | None = None, *, retry_after_seconds: int | None = None) -> None:
        self.message = message or self.default_message
        self.retry_after_seconds = retry_after_seconds
        self.is_repeat = False  # what an earlier request failed with is told again
        super().__init__(self.message)


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


class Unauthorized(AppError):
    """No login token, or one that is expired, forged or of a user who is gone."""

    status = 401
    code = "UNAUTHORIZED"
    default_message = "未登录或登录已失效，请重新登录"


class InvalidCredentials(Unauthorized):
    """The name or the password is wrong; which of them is not told."""

    default_message = "用户名或密码错误"


class InvalidApiKey(Unauthorized):
    """The provider does not accept the user's API key."""

    default_message = "百炼 API Key 无效，请检查密钥与地域是否正确"


class NoApiKey(AppError):
    """The user has not stored an API key."""

    status = 403
    code = "NO_API_KEY"
    default_message = "未配置API密钥，请在用户设置中配置apikey"


class RegistrationClosed(AppError):
    """The operator does not let people register by themselves."""

    status = 403
    code = "REGISTRATION_CLOSED"
    default_message = "当前未开放注册，请联系管理员"


class BudgetExceeded(AppError):
    """The call would bring the month's cost above the user's own budget."""

    status = 403
    code = "BUDGET_EXCEEDED"
    default_message = "超出本月预算"


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


class UsernameTaken(AppError):
    """Somebody already registered under this name."""

    status = 409
    code = "USERNAME_TAKEN"
    default_message = "用户名已被占用，请换一个"


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


class RateLimited(AppError):
    """Too many requests within the window; `retry_after_seconds` says when to come back."""

    status = 429
    code = "RATE_LIMITED"
    default_message = "请求过于频繁，请稍后重试"


class Throttled(RateLimited):
    """The provider's rate limit held on through our own retries."""

    default_message = "百炼平台限流，请稍后重试"


class SealBroken(AppError):
    """A stored API key does not open with any of the sealing keys, or belongs to another row."""

    default_message = "已保存的API密钥无法解密，请重新配置apikey"


class UpstreamError(AppError):
    """The provider answered with an error that the client cannot mend by changing the request.

    `is_its_fault` says that it blames itself (5xx), so that it may have done part of the work.
    """

    status = 502
    code = "UPSTREAM_ERROR"
    default_message = "百炼平台返回错误"
    is_its_fault = False


class ConnectionLost(UpstreamError):
    """The provider could not be reached, or the connection broke before the work was done."""

    default_message = "与百炼平台的连接中断，请稍后重试"


class Unreachable(ConnectionLost):
    """No connection to the provider came up; no work was accepted."""

    default_message = "无法连接百炼平台，请稍后重试"


class UnclearAnswer(UpstreamError):
    """The provider, or a gateway in front of it, answered without telling whether the work was done."""

    default_message = "百炼平台返回了无法识别的响应，请稍后重试"


class UpstreamNotFound(UpstreamError):
    """The provider has nothing under the name it was asked for."""

    default_message = "百炼平台上没有该资源"


class StorageError(UpstreamError):
    """The object store refused, or could not be reached within the bounded retries."""

    default_message = "音频存储失败，请稍后重试"


class NotReady(AppError):
    """This process cannot serve at the moment."""

    status = 503
    code = "NOT_READY"
    default_message = "服务尚未就绪"


class StorageFull(NotReady):
    """Neither the object store nor this machine's disk can take more audio."""

    default_message = "音频存储暂时不可用且本地空间已满，请稍后重试，或请管理员检查对象存储与磁盘空间"


class Restarting(NotReady):
    """This process is about to end: what was not said completely is broken off."""

    default_message = "服务正在重启，语音已中止，已合成的部分见历史记录"


class UpstreamTimeout(AppError):
    """The provider was silent for too long."""

    status = 504
    code = "TIMEOUT"
    default_message = "百炼平台长时间没有响应，请稍后重试"


class HandshakeTimeout(UpstreamTimeout):
    """No connection to the provider came up in time; no work was accepted."""

    default_message = "连接百炼平台超时，请稍后重试"
