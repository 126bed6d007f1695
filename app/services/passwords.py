"""Passwords, hashed and compared in few threads: each takes 19 MiB and a core for its time."""

import os

from anyio import CapacityLimiter, to_thread

from app.errors import RateLimited, WeakPassword
from app.security import count_guesses, hash_password, verify_password

# Others need the processor too while somebody floods us with logins.
HASHING_THREADS = max(1, (os.cpu_count() or 1) // 2)
# Whoever comes when so many wait would wait for seconds: floods of logins are told to come back.
MAX_WAITING = 100
COME_BACK_SECONDS = 3


class Passwords:
    """Makes and compares hashes, and judges new passwords."""

    def __init__(self, min_guesses: int) -> None:
        """Passwords that are found in fewer guesses than that are refused."""
        self._min_guesses = min_guesses
        self._threads = CapacityLimiter(HASHING_THREADS)
        self._judging = CapacityLimiter(1)

    async def hash(self, password: str) -> str:
        """Hash a password. Raises RateLimited when too many wait for that."""
        self.require_room()
        return await to_thread.run_sync(hash_password, password, limiter=self._threads)

    async def verify(self, password: str, password_hash: str | None) -> tuple[bool, str | None]:
        """Say whether a password fits, in the same time without a hash, and give a hash to replace an outdated one.

        Raises RateLimited when too many wait for that.
        """
        self.require_room()
        return await to_thread.run_sync(verify_password, password, password_hash, limiter=self._threads)

    async def require_strong(self, password: str, username: str) -> None:
        """Refuse a new password that is guessed soon, also by who knows the user's name. Raises WeakPassword."""
        self.require_room()
        if await to_thread.run_sync(count_guesses, password, username, limiter=self._judging) < self._min_guesses:
            raise WeakPassword

    def require_room(self) -> None:
        """Raise RateLimited when too many wait already."""
        if max(each.statistics().tasks_waiting for each in (self._threads, self._judging)) >= MAX_WAITING:
            raise RateLimited("登录与注册请求过多，请稍后重试", retry_after_seconds=COME_BACK_SECONDS)
