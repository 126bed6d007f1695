"""Who asks may not do it, not now, or not so often."""

from app.errors.root import AppError


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


class InvalidInvite(AppError):
    """Registration takes an invite, and this is none, or one that is used up or expired."""

    status = 403
    code = "INVALID_INVITE"
    default_message = "邀请码无效、已使用或已过期，请向管理员索取"


class AdminOnly(AppError):
    """The route is for administrators."""

    status = 403
    code = "ADMIN_ONLY"
    default_message = "该接口仅限管理员使用"


class BudgetExceeded(AppError):
    """The call would bring the month's cost above the user's own budget."""

    status = 403
    code = "BUDGET_EXCEEDED"
    default_message = "超出本月预算"


class UserNotFound(AppError):
    """There is no such user."""

    status = 404
    code = "NOT_FOUND"
    default_message = "用户不存在"


class InviteNotFound(AppError):
    """There is no such invite."""

    status = 404
    code = "NOT_FOUND"
    default_message = "邀请不存在"


class UsernameTaken(AppError):
    """Somebody already registered under this name."""

    status = 409
    code = "USERNAME_TAKEN"
    default_message = "用户名已被占用，请换一个"


class LastAdmin(AppError):
    """Nobody would be left to administer the service."""

    status = 409
    code = "LAST_ADMIN"
    default_message = "不能停用或取消最后一个管理员，请先指定另一个管理员"


class WeakPassword(AppError):
    """The new password is among the first that somebody would try."""

    status = 400
    code = "WEAK_PASSWORD"
    default_message = "密码太容易被猜到，请换一个更长或更少见的密码"


class WrongPassword(AppError):
    """Who wants another password does not know the present one."""

    status = 400
    code = "WRONG_PASSWORD"
    default_message = "当前密码错误"


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
