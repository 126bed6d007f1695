"""A provider that is told what to do, and users of the client who speak through it."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from app.dashscope import ConnectionPool, Credential
from tests.dashscope.provider import Provider
from tests.dashscope.speaker import Speaker


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a retry, or for a dead peer to answer a close."""
    monkeypatch.setattr("app.dashscope.failures.RETRY_BASE_SECONDS", 0.002)
    monkeypatch.setattr("app.dashscope.pool.CLOSE_SECONDS", 0.2)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A provider without a plan yet."""
    async with Provider.run() as running:
        yield running


@pytest.fixture
async def other_provider() -> AsyncIterator[Provider]:
    """A second provider, at another address."""
    async with Provider.run() as running:
        yield running


@pytest.fixture
async def pool(provider: Provider, other_provider: Provider) -> AsyncIterator[ConnectionPool]:
    """Connections that are closed before the providers stop."""
    pool = ConnectionPool(handshake_seconds=5)
    yield pool
    await pool.close()


@pytest.fixture
def speaker(pool: ConnectionPool, provider: Provider) -> Speaker:
    """A user who waits long enough for a busy machine."""
    return Speaker(pool, Credential("sk-test-1", provider.url, "http://unused.test"), silence_seconds=5)


@pytest.fixture
def impatient(speaker: Speaker) -> Speaker:
    """The same user, who soon takes silence for an answer."""
    return replace(speaker, silence_seconds=0.3)
