"""Redis, which keeps the rate limits of several processes together."""

import time
from datetime import UTC, datetime

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from app.doctor.case import Case
from app.doctor.failures import explain_failure
from app.doctor.finding import Finding, fail, ok, skip, warn

CHECK = "redis"
SLOW_MS = 50.0
CONNECT_SECONDS = 4.0
_MEANWHILE = "Until then, calls pass without any limit."


async def examine_redis(case: Case) -> list[Finding]:
    """Ask Redis for an answer, its version and its time."""
    if not case.settings.redis_url:
        return [skip(CHECK, "REDIS_URL is not set: each process counts the rate limits alone, in memory")]
    try:
        client = Redis.from_url(
            case.settings.redis_url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=CONNECT_SECONDS
        )
    except ValueError:
        return [fail(CHECK, "REDIS_URL is malformed", "Write it as redis://:password@host:6379/0")]
    try:
        return await _ask(case, client)
    except (AuthenticationError, ResponseError):
        advice = f"Check user and password in REDIS_URL, and the rights of that user. {_MEANWHILE}"
        return [fail(CHECK, "Redis refuses us", advice)]
    except (RedisError, OSError) as error:
        found, advice = explain_failure(error)
        return [fail(CHECK, f"Redis cannot be asked: {found}", f"{advice} {_MEANWHILE}")]
    finally:
        await client.aclose()


async def _ask(case: Case, client: Redis) -> list[Finding]:
    await client.ping()
    asked_at, began = time.time(), time.perf_counter()
    seconds, microseconds = await client.time()
    latency_ms = (time.perf_counter() - began) * 1000
    case.clocks.read("Redis", datetime.fromtimestamp(seconds + microseconds / 1e6, UTC), asked_at)
    server = await client.info("server")
    found = f"Redis {server.get('redis_version', 'of unknown version')} answers in {latency_ms:.1f} ms"
    if latency_ms > SLOW_MS:
        return [warn(CHECK, found, "Every request asks it once or twice: bring it nearer.")]
    return [ok(CHECK, found)]
