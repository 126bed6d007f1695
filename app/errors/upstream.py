"""The provider, the store or this server could not do it."""

from app.errors.root import AppError


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
