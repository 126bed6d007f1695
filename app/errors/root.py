"""The root of all errors."""

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
